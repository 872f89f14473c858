"""What goes wrong in a machine, made to go wrong: a loss, a gradient or a weight of one rank at one step, or a disk.

``python tests/faults.py train …`` is the command with the faults that FAULTS names, as ``loss:5:1 weight:8:0``.
"""

import os
import time
import types

LAYER = "features.conv3.weight"  # which gradient and which weight


def inject(kind, step, rank=0, *, times=1, patch=setattr):
    """Has the computation of ``step``, counted from 1, go wrong on a rank, as often as it comes there up to ``times``.

    Args:
        kind: ``loss`` and ``gradient`` are NaN and Inf then, ``weight`` has one bit flipped after the step, and
            ``disk`` takes seconds to write the checkpoint of the step.
        step: which.
        rank: where.
        times: how often.
        patch: sets an attribute, as setattr.
    """
    from knltrain.checkpoint import writer
    from knltrain.training import step as stepping
    from knltrain.training import step_guard, trainer

    at = {"step": -1, "rank": -1, "left": times}

    def due():
        at["left"] -= at["step"] == step and at["rank"] == rank
        return at["step"] == step and at["rank"] == rank and at["left"] >= 0

    original_begin = step_guard.StepGuard.begin_step

    def begin_step(guard):
        at["rank"] = guard._group.rank
        original_begin(guard)

    original_seed = stepping.seed_dropout

    def seed_dropout(seed, number, micro):
        at["step"] = number + 1
        original_seed(seed, number, micro)

    patch(step_guard.StepGuard, "begin_step", begin_step)
    patch(stepping, "seed_dropout", seed_dropout)

    if kind == "loss":
        cross_entropy = stepping.F.cross_entropy

        def bad_loss(*arguments, **options):
            return cross_entropy(*arguments, **options) * (float("nan") if due() else 1.0)

        patch(stepping, "F", types.SimpleNamespace(cross_entropy=bad_loss))
    elif kind == "gradient":
        data_parallel = stepping.data_parallel

        def with_hook(model, *arguments):
            def spoil(gradient):
                return gradient * float("inf") if due() else gradient

            dict(model.named_parameters())[LAYER].register_hook(spoil)
            return data_parallel(model, *arguments)

        patch(stepping, "data_parallel", with_hook)
    elif kind == "weight":
        finish_step = trainer.finish_step

        def after_a_flip(run, *arguments, **options):
            if due():
                flip(run.state.engine.weights()[LAYER], bit=3)
            finish_step(run, *arguments, **options)

        patch(trainer, "finish_step", after_a_flip)
    elif kind == "disk":
        write = writer.write

        def slowly(snapshot, folder):
            time.sleep(5.0 * folder.name.endswith(f"-{step:08}"))
            write(snapshot, folder)

        patch(writer, "write", slowly)
    else:
        raise ValueError(kind)


def inject_all(faults, *, patch=setattr):
    """Injects what a string as of FAULTS names."""
    for fault in faults.split():
        kind, step, rank = fault.split(":")
        inject(kind, int(step), int(rank), patch=patch)


def flip(tensor, bit):
    """Flips one bit of a number in the middle of a float32 tensor."""
    import torch

    memory = tensor.as_strided((tensor.numel(),), (1,)).view(torch.int32)
    memory[tensor.numel() // 2] ^= (1 << bit) - (2**32 if bit == 31 else 0)


if __name__ == "__main__":
    from knltrain.cli import train
    from knltrain.cli.main import main

    bind_rank = train._bind_rank

    def bind_rank_and_inject(**options):
        place = bind_rank(**options)  # torch comes after it
        inject_all(os.environ["FAULTS"])
        return place

    train._bind_rank = bind_rank_and_inject
    main()
