"""The pictures of a prediction: what their axes show, and that legends cover nothing."""

import dataclasses

import pytest
from foreseen import ALEXNET, job
from matplotlib.figure import Figure

from knltrain.predict.advice import doublings
from knltrain.predict.draw import draw_scaling, draw_step
from knltrain.predict.run import predict


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws, and returns the axes of the figure."""

    def draw(function, *arguments):
        figures = []
        monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
        function(*arguments, tmp_path / "figure.png")
        (figure,) = figures
        figure.canvas.draw()
        for axes in figure.axes:
            if legend := axes.get_legend():
                assert not legend.get_window_extent().overlaps(axes.get_window_extent())
        return figure.axes

    return draw


def test_times_have_one_unit_and_numbers_that_can_be_read(drawn):
    times, parts = drawn(draw_scaling, doublings(job()))
    assert times.get_ylabel() == "minutes"
    low, high = times.get_ylim()
    shown = [label.get_text() for label in times.get_yticklabels() if low <= label.get_position()[1] <= high]
    assert shown == ["10", "100", "1,000"]
    assert len(times.get_xticks()) <= 9
    fastest = min(one.total_s for one in doublings(job())) / 60
    assert 0.3 * fastest < low < fastest
    texts = [text.get_text() for text in times.get_legend().get_texts()]
    assert texts[0].startswith(f"batch 32,768, at best {fastest:,.3g} minutes on ")
    assert sum(bar.get_height() for bar in parts.patches) == pytest.approx(100 * len(doublings(job())), rel=0.01)


def test_a_few_days_are_days(drawn):
    slow = [one for one in doublings(job()) if one.job.nodes <= 2]
    times, _ = drawn(draw_scaling, slow)
    assert times.get_ylabel() == "days"
    assert len([label for label in times.get_yticklabels() if label.get_text()]) >= 2


def test_a_line_for_each_batch(drawn):
    several = [predict(job(dataclasses.replace(ALEXNET, global_batch=batch), nodes=nodes))
               for batch in (8192, 4096) for nodes in (16, 4, 8)]  # fmt: skip
    times, parts = drawn(draw_scaling, several)
    assert [text.get_text().split(",")[0] for text in times.get_legend().get_texts()] == [
        "batch 4", "batch 8", "linear scaling"]  # fmt: skip
    assert times.lines[0].get_xdata().tolist() == [4, 8, 16]
    assert "8,192" in parts.get_ylabel()


def test_a_step_of_many_micro_batches_is_shown_from_the_last_on(drawn):
    one = predict(job(dataclasses.replace(ALEXNET, local_batch=64), nodes=8))
    assert one.accumulate == 64
    (axes,) = drawn(draw_step, one)
    assert axes.get_xlabel() == "ms since the last of 64 micro-batches began"
    assert axes.get_xlim()[1] < 1e3 * one.step.seconds / 10
    assert min(bar.get_x() for bar in axes.patches) == pytest.approx(0, abs=1e-6)
    assert max(bar.get_x() + bar.get_width() for bar in axes.patches) == pytest.approx(axes.get_xlim()[1])


def test_a_step_of_one_micro_batch_is_shown_whole(drawn):
    one = predict(job())
    (axes,) = drawn(draw_step, one)
    assert axes.get_xlabel() == "ms"
    assert axes.get_xlim() == pytest.approx((0, 1e3 * one.step.seconds))
