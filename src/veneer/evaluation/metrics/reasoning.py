"""Separates the reasoning of an answer from what follows it: only that is judged."""


def final_text(answer: str) -> str:
    """Return what follows the reasoning of an answer; all of it where there is none, or nothing follows."""
    return answer.rpartition("</think>")[2].strip() or answer.strip()
