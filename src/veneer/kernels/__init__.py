"""Operations of the fused engine: one per file, with its plain torch twin and its backward."""
