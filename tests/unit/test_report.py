"""The picture of a run's loss."""

from pathlib import Path

from veneer.report.plots import plot_loss, smooth


def test_the_running_mean_follows_without_a_lag() -> None:
    rising = [float(n) for n in range(61)]
    assert smooth(rising)[30] == 30.0
    assert smooth([1.0, 1.0, 1.0]) == [1.0, 1.0, 1.0]
    assert len(smooth([1.0] * 7)) == 7


def test_a_picture_is_drawn_of_whatever_was_logged(tmp_path: Path) -> None:
    records = [{"kind": "train", "step": n + 1, "loss": 1 / (n + 1)} for n in range(20)]
    for name, shown in (("short", records[:1]), ("long", [*records, {"kind": "eval", "step": 20, "loss": 0.1}])):
        plot_loss(shown, tmp_path / f"{name}.png", name)
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    assert not list(tmp_path.glob(".*"))
