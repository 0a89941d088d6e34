"""TRL's own dataset preparation, timed: run by bench/data.py with the Python of an environment that has TRL.

Rows reach it in the shape it is fastest with (prompt / completion or messages, both as turns) and as an Arrow dataset
that is loaded already; neither is timed. Prints JSON: seconds, tokens, packed sequences.

    python bench/data_trl.py completion rows.json TOKENIZER_FOLDER 2048
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def main(loss: str, file: str, tokenizer_folder: str, length: str) -> dict[str, Any]:
    """Prepare one file with one kind of loss, as SFTTrainer does when it is made."""
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found, unused-ignore]

    datasets.disable_progress_bars()
    datasets.disable_caching()
    turns = json.loads(Path(file).read_text())
    if loss == "completion":
        rows = [{"prompt": row[:-1], "completion": row[-1:]} for row in turns]
    else:
        rows = [{"messages": row} for row in turns]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    if loss == "assistant":
        tokenizer.chat_template = GENERATION
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
    seconds: list[float] = []
    prepare = SFTTrainer._prepare_dataset

    def timed(*given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        result = prepare(*given, **named)
        seconds.append(time.perf_counter() - began)
        return result

    SFTTrainer._prepare_dataset = timed  # to time it alone, not the trainer around it
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            max_length=int(length),
            packing=True,
            packing_strategy="bfd",
            completion_only_loss=loss == "completion",
            assistant_only_loss=loss == "assistant",
            report_to=[],
            use_cpu=True,
            bf16=False,
        )
        dataset = datasets.Dataset.from_list(rows)
        trainer = SFTTrainer(model, args=settings, train_dataset=dataset, processing_class=tokenizer)
        packed = trainer.train_dataset
        tokens = sum(len(ids) for ids in packed["input_ids"])
    return {
        "seconds": round(seconds[0], 3),
        "tokens": tokens,
        "sequences": len(packed),
        "efficiency": round(tokens / (len(packed) * int(length)), 5),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
