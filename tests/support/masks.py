"""Random conversations, and what of them must be trained, told without a template."""

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.support.rows import conversation

TEXT = st.text(max_size=40) | st.sampled_from(
    [
        "<|im_end|>",
        "x<|im_start|>user\n",
        "</s>",
        "<|endoftext|>a",
        "  spaced  ",
        "\n",
        "",
        "🦉猫 é",
        "the cat " * 200,
        "\ufdd0",
    ]
)
TURN = st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), TEXT)
TRIMS = {"llama-3", "gemma", "mistral"}  # named templates that trim answers
STARTS = {"guanaco": " ", "mistral": " "}  # what they put before an answer, as part of it


def alternating(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Turns without two answers in a row."""
    return [turn for n, turn in enumerate(turns) if n == 0 or turn[0] != "assistant" or turns[n - 1][0] != "assistant"]


def check_mask(made: Any, tokenizer: Any, chat: list[tuple[str, str]], end: str, trims: bool, starts: str = "") -> None:
    """The trained tokens are the answers and their ends, told from the conversation alone."""
    example = made.example(conversation(chat))
    answers = [text.strip() if trims else text for role, text in chat if role == "assistant"]
    trained = example.ids[example.weights > 0]
    assert tokenizer.decode(trained) == "".join(starts + answer + end for answer in answers)
    end_id = tokenizer.convert_tokens_to_ids(end)
    assert [token for token in trained if token in tokenizer.all_special_ids] == [end_id] * len(answers)


def hypothesis_settings(examples: int) -> Any:
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def random_chats() -> Any:
    return st.lists(TURN, min_size=1, max_size=6).map(alternating).filter(lambda c: any(r == "assistant" for r, _ in c))
