"""What other programs call our fields: torchvision's references, torch's examples, timm, Lightning, DeepSpeed, Caffe.

Such a name is not accepted, because it may mean something slightly else; the error says ours.
"""

from __future__ import annotations

from typing import NamedTuple


class Alias(NamedTuple):
    """What a foreign name is here.

    Attributes:
        fields: names of ours, of which a command may have only some; none where there is no such field.
        note: what to know, in a few words.
    """

    fields: tuple[str, ...] = ()
    note: str = ""


_BATCH = Alias(("global_batch", "batch", "batches"), "images of an update over all ranks")
_RANK_BATCH = Alias(("local_batch",), "of one rank; global-batch is that of an update over all ranks")
_LR = Alias(("optim.lr", "lr_factors"))
_EPOCHS = Alias(("epochs",))
_WARMUP = Alias(("schedule.warmup_epochs",), "in epochs")
_SCHEDULE = Alias(("schedule.name",), "poly, poly-after-warmup, step or constant")
_OUT = Alias(("out",))
_DATA = Alias(("data",), "a folder with train/CLASS and val/CLASS, or the output of prepare")
_WORKERS = Alias(("workers",), "decoder threads of a rank")
_BF16 = Alias(("precision",), "bf16, fp32 or auto")
_WEIGHTS = Alias(("init_from",), "a file of weights or a run's folder; nothing is downloaded")
_CLASSES = Alias((), "the folders of --data say how many classes there are")
_EVAL = Alias((), "`knltrain eval CHECKPOINT` evaluates")
_LOG = Alias((), "every step is in OUT/metrics.jsonl, without an option")
_LAUNCHER = Alias((), "the launcher says it: torchrun, mpiexec, srun or `knltrain launch`")
_CLIP = Alias((), "gradients are not clipped; LARS bounds each layer's update by its trust ratio")
_AUGMENT = Alias(("augment.name",), "none, crop-flip, rrc or pad-crop-flip")
_EMA = Alias(("ema_decay",), "a decay alone turns the moving average on")
_KEEP = Alias(("checkpoint.keep",), "how many; the best by top-1 stays beside them")
_EVERY = Alias(("checkpoint.every",), "in epochs")
_ACCUMULATE = Alias(("local_batch",), "a smaller micro-batch is accumulated up to global-batch")
_DEVICE = Alias((), "knltrain computes on CPUs; `knltrain plan` shows which cores")
_COMPILE = Alias(("engine",), "compile, fused, eager or ipex")

_ALIASES: dict[str, Alias] = {
    **dict.fromkeys(("b", "bs", "batch_size", "train_batch_size", "total_batch_size", "batchsize"), _BATCH),
    **dict.fromkeys(("train_micro_batch_size_per_gpu", "micro_batch_size", "per_device_train_batch_size",
                     "batch_size_per_gpu", "per_gpu_batch_size"), _RANK_BATCH),
    **dict.fromkeys(("lr", "learning_rate", "base_lr", "initial_lr", "init_lr", "max_lr", "lr_base"), _LR),
    **dict.fromkeys(("max_epochs", "num_epochs", "n_epochs", "num_train_epochs", "total_epochs", "nb_epochs"), _EPOCHS),
    **dict.fromkeys(("max_iter", "max_iters", "iterations", "train_iters", "num_steps", "max_train_steps"),
                    Alias(("max_steps",), "stops early, on the schedule of all epochs")),
    **dict.fromkeys(("wd", "weight_decay", "weight_decay_rate", "l2"), Alias(("optim.weight_decay",))),
    **dict.fromkeys(("norm_weight_decay", "bias_weight_decay", "no_decay"), Alias(("optim.decay_on",))),
    "momentum": Alias(("optim.momentum",)),
    **dict.fromkeys(("opt", "optimizer", "optim", "solver_type"), Alias(("optim.name", "optimizers"))),
    **dict.fromkeys(("opt_eps", "eps", "epsilon"), Alias(("optim.eps",))),
    **dict.fromkeys(("trust_coefficient", "trust_coef", "eta"), Alias(("optim.trust_coefficient",))),
    "nesterov": Alias(("optim.variant",), "nesterov"),
    **dict.fromkeys(("sched", "scheduler", "lr_scheduler", "lr_policy", "lr_schedule", "schedule"), _SCHEDULE),
    **dict.fromkeys(("warmup_epochs", "lr_warmup_epochs", "warmup", "warmup_steps", "warmup_num_steps", "warmup_ratio"),
                    _WARMUP),
    **dict.fromkeys(("warmup_lr", "lr_warmup_decay", "warmup_min_lr"), Alias(("schedule.warmup_lr",))),
    **dict.fromkeys(("lr_min", "min_lr", "end_lr", "final_lr"), Alias(("schedule.end_lr",))),
    **dict.fromkeys(("lr_steps", "decay_milestones", "milestones", "lr_step_size", "stepsize", "stepvalue",
                     "decay_epochs", "step_size"), Alias(("schedule.milestones",), "the epochs, as 30,60,80")),
    **dict.fromkeys(("lr_gamma", "gamma", "decay_rate"), Alias(("schedule.gamma",))),
    **dict.fromkeys(("a", "arch", "network", "net", "backbone", "model_name"), Alias(("model",))),
    **dict.fromkeys(("output", "output_dir", "save_dir", "default_root_dir", "log_dir", "logdir", "work_dir",
                     "snapshot_prefix", "experiment", "checkpoint_dir"), _OUT),
    **dict.fromkeys(("data_path", "data_dir", "dataset", "data_root", "dataset_path", "root", "train_dir"), _DATA),
    **dict.fromkeys(("j", "num_workers", "dataloader_num_workers", "n_workers"), _WORKERS),
    **dict.fromkeys(("amp", "amp_dtype", "fp16", "bf16", "half", "mixed_precision", "dtype"), _BF16),
    **dict.fromkeys(("pretrained", "weights", "initial_checkpoint", "finetune", "pretrained_path", "load"), _WEIGHTS),
    **dict.fromkeys(("ckpt_path", "resume_from", "resume_from_checkpoint", "checkpoint", "start_epoch", "snapshot",
                     "auto_resume"), Alias(("resume",), "the same command resumes by itself")),
    **dict.fromkeys(("num_classes", "nb_classes", "n_classes"), _CLASSES),
    "class_map": Alias(("class_order",), "a file with one class name a line"),
    **dict.fromkeys(("img_size", "input_size", "crop_size", "image_res", "resolution", "train_crop_size",
                     "val_crop_size", "size"), Alias(("image_size",), "pixels")),
    **dict.fromkeys(("val_resize_size", "crop_pct", "resize", "resize_size"),
                    Alias(("augment.resize",), "the short side before cropping, pixels")),
    **dict.fromkeys(("e", "evaluate", "test_only", "eval_only", "validate_only"), _EVAL),
    **dict.fromkeys(("p", "print_freq", "log_interval", "log_every_n_steps", "display", "log_freq", "logging_steps"),
                    _LOG),
    **dict.fromkeys(("world_size", "rank", "local_rank", "dist_url", "dist_backend", "nproc_per_node", "nnodes",
                     "num_nodes", "node_rank", "master_addr", "master_port", "multiprocessing_distributed"), _LAUNCHER),
    **dict.fromkeys(("gpu", "gpus", "device", "devices", "accelerator", "cuda", "no_cuda"), _DEVICE),
    **dict.fromkeys(("clip_grad", "clip_grad_norm", "gradient_clip_val", "gradient_clipping", "max_grad_norm"), _CLIP),
    **dict.fromkeys(("aa", "auto_augment", "mixup", "mixup_alpha", "cutmix", "cutmix_alpha", "hflip", "color_jitter",
                     "random_erase", "reprob", "no_aug", "augmentation"), _AUGMENT),
    **dict.fromkeys(("smoothing", "label_smooth"), Alias(("label_smoothing",))),
    **dict.fromkeys(("drop", "dropout_rate", "drop_rate"), Alias(("dropout",))),
    **dict.fromkeys(("model_ema", "model_ema_decay", "ema"), _EMA),
    **dict.fromkeys(("checkpoint_hist", "save_top_k", "keep_checkpoint_max", "save_total_limit"), _KEEP),
    **dict.fromkeys(("save_freq", "save_every", "save_steps", "checkpoint_interval", "save_interval"), _EVERY),
    **dict.fromkeys(("gradient_accumulation_steps", "accumulate_grad_batches", "grad_accum_steps", "iter_size",
                     "accum_iter"), _ACCUMULATE),
    **dict.fromkeys(("random_seed", "manual_seed", "random_state"), Alias(("seed", "seeds"))),
    **dict.fromkeys(("torchcompile", "compile", "channels_last", "jit"), _COMPILE),
    **dict.fromkeys(("sync_bn", "dist_bn"), Alias((), "each rank normalises its own images")),
    "backend": Alias(("comm.backend",), "auto, ccl or gloo"),
    "config_file": Alias(("config",), "a TOML file of fields"),
    "c": Alias(("config",), "a TOML file of fields"),
    "cfg": Alias(("config",), "a TOML file of fields"),
    "o": _OUT,
}  # fmt: skip


def find(name: str) -> Alias | None:
    """Returns what a foreign name is here, with dashes or underscores, alone or as the last part of a dotted one."""
    plain = name.lstrip("-").replace("-", "_").lower()
    return _ALIASES.get(plain) or _ALIASES.get(plain.rpartition(".")[2])
