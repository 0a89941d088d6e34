"""Draws docs/images/engine.png: a block's tensors with what each costs to keep, and where a step's time goes.

python3 bench/engine_figure.py      # from bench/results/engine.json
"""

import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
# Of Llama-3-8B, in MiB a layer for 1,024 tokens, and what makes it again.
TENSORS = {
    "x": (8, "kept: the checkpoint"),
    "q, k, v": (12, "norm, product, rotation"),
    "attention's output": (8, "attention"),
    "mid": (8, "o_proj, sum"),
    "gate, up": (56, "norm, product"),
    "h": (28, "made anew by backward in any case"),
}
PLAIN = {  # the shares of a plain hand-written block's 520 ms, as measured before this engine
    "large products": 312, "attention": 42, "4-bit weights": 18, "adapters' own products": 57, "loss": 10,
    "norms, gate, rotation": 44, "other": 37,
}  # fmt: skip


def main() -> None:
    found = json.loads((HERE / "results" / "engine.json").read_text())
    profiles = {
        "plain block": PLAIN,
        "first version": found["before"]["profile_ms"],
        "now": found["8b"]["4x2048@74"]["profile_ms"],
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    for row, (name, (size, source)) in enumerate(TENSORS.items()):
        is_kept = name == "x"
        left.barh(-row, size, color="tab:blue" if is_kept else "tab:orange" if name != "h" else "tab:gray")
        left.text(size + 1, -row, f"{size} MiB   {source}", va="center", fontsize=9)
    left.set_yticks([-row for row in range(len(TENSORS))], list(TENSORS))
    left.set(
        xlim=(0, 105), xlabel="MiB a layer for 1,024 tokens", title="A block's tensors: kept or made again (orange)"
    )
    names = list(dict.fromkeys(name for profile in profiles.values() for name in profile))
    for number, profile in enumerate(profiles.values()):
        start = 0.0
        for color, name in enumerate(names):
            spent = profile.get(name, 0.0)
            right.barh(-number, spent, left=start, color=f"C{color}", label=name if number == 0 else None)
            if spent > 25:
                right.text(start + spent / 2, -number, f"{spent:.0f}", ha="center", va="center", fontsize=9)
            start += spent
        right.text(start + 4, -number, f"{start:.0f} ms", va="center", fontsize=9)
    handles = [plt.Rectangle((0, 0), 1, 1, color=f"C{color}") for color in range(len(names))]
    right.legend(handles, names, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    right.set_yticks([-n for n in range(len(profiles))], list(profiles))
    right.set(xlim=(0, 600), xlabel="ms", title="Kernels of a step: 8B, 4 x 2,048 tokens, nothing recomputed, H100")
    figure.savefig(HERE.parent / "docs" / "images" / "engine.png", dpi=110)


if __name__ == "__main__":
    main()
