import pytest
from matplotlib.figure import Figure

from knltrain.runlog.curves import draw_curves

ROWS = [
    {"step": 1, "epoch": 0.5, "loss": 2.0},
    {"step": 2, "epoch": 1.0, "loss": None},
    {"step": 3, "epoch": 1.5, "loss": 1.5},
    {"step": 3, "epoch": 1.5, "top1": 40.0, "val_loss": 1.6},
    {"step": 4, "epoch": 2.0, "top1": 100.0, "top5": 100.0, "val_loss": 0.6},
]


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], []])
def test_curves_are_drawn_of_any_number_of_rows(tmp_path, rows):
    draw_curves(rows, tmp_path / "curves.png", "title")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_legends_are_beside_the_curves(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    draw_curves(ROWS, tmp_path / "curves.png", "title")
    (figure,) = drawn
    figure.canvas.draw()
    assert len(figure.axes) == 2
    for axes in figure.axes:
        assert not axes.get_legend().get_window_extent().overlaps(axes.get_window_extent())
