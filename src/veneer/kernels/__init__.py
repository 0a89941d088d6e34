"""Operations the engine is built from: one a file, with its plain torch twin and its backward."""
