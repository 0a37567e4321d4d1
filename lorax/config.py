"""The schema of a trial: plain dataclasses, the only form of configuration the library sees.

Hydra composes and type-checks against these classes; `OmegaConf.to_object` turns the result
into instances in `lorax/launch/application.py`, so nothing below ever holds a DictConfig.
"""

from dataclasses import dataclass, field
from typing import Any

# Settings that older trials do not know, and what they had instead.
ADDED: dict[str, Any] = {
    "train.remat": False,
    "train.label_smoothing": 0.0,
    "task.content": None,
    "model.content": None,
    "model.tokenizer_content": None,
    "train.dropout_generator": None,
}
# Which fields say what a trial is trained on: SHA-256 digests, and the generator of its masks.
CONTENT = {
    "data": "task.content",
    "tokenizer": "model.tokenizer_content",
    "base": "model.content",
    "masks": "train.dropout_generator",
}
# What drew the masks of trials that do not name their generator, if they drew any.
EARLIER_MASKS = "threefry"


@dataclass
class TaskConfig:
    """What is learned.

    Attributes:
      name: a key of `lorax.data.TASKS` (`cola`, `mrpc`, ..., `reviews`; `text`, `instructions`
        and `e2e` for decoders).
      data_dir: a folder in GLUE's TSV layout; None looks in the places `lorax.data` names and
        then on the hub. Of a decoder's task the file or folder that docs/data.md describes.
      max_length: longest token sequence, special tokens included; longer ones are truncated, and
        a `text` is cut into blocks of this length.
      content: the SHA-256 of the task's files, which the commands fill in: with another content it
        is another trial.
      max_train_samples: train on this many examples, a fixed draw that no seed changes.
      max_dev_samples: likewise for each dev split.
    """

    name: str = "reviews"
    data_dir: str | None = None
    max_length: int = 128
    content: str | None = None
    max_train_samples: int | None = None
    max_dev_samples: int | None = None


@dataclass
class ModelConfig:
    """The frozen base.

    Attributes:
      name: the label that tables and directories show.
      source: a local folder with config.json, model.safetensors and tokenizer.json, or a
        repository id of the Hugging Face hub.
      revision: branch, tag or commit on the hub.
      pooling: what the head reads: `mean` over real tokens, `cls` (first token) or `pooler`
        (the checkpoint's own dense + tanh over the first token, trained with the head).
      attention: `xla` or `cudnn` (both `jax.nn.dot_product_attention`), or `einsum` (plain).
      dropout: hidden and attention dropout while training; None takes the checkpoint's own.
      content: the SHA-256 of the base's config and weights, or their commit on the hub, which the
        commands fill in: with another content it is another trial.
      tokenizer_content: likewise of the tokenizer's files.
    """

    name: str = "minilm"
    source: str = "assets/minilm"
    revision: str | None = None
    pooling: str = "mean"
    attention: str = "einsum"
    dropout: float | None = None
    content: str | None = None
    tokenizer_content: str | None = None


@dataclass
class LoraConfig:
    """The adapter: the fields of `lorax.LoraSpec`, which documents and checks them.

    Attributes:
      rank: rank of every target that no pattern names.
      alpha: the adapter is scaled by alpha / rank.
      scaling: `lora` (alpha / rank) or `rslora` (alpha / sqrt(rank)).
      targets: layers to adapt: any of `q` `k` `v` `o` together, `mlp`, `all-linear`, a module's
        name, a regex, or a list of these.
      exclude: names or regexes of layers that are not adapted.
      layers: numbers of the layers that are adapted; None: all.
      rank_pattern: rank by module name or regex, where it is not `rank`; an entry is added by
        +lora.rank_pattern.query=4.
      alpha_pattern: likewise, alpha.
      dropout: dropout rate on the input of A.
      init: how A starts, a key of `lorax.lora.initializers.INITIALIZERS`; B starts at zero.
    """

    rank: int = 8
    alpha: float = 16.0
    scaling: str = "lora"
    targets: Any = "qv"
    exclude: list[str] = field(default_factory=list)
    layers: list[int] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    dropout: float = 0.0
    init: str = "kaiming_uniform"


@dataclass
class OptimizerConfig:
    """AdamW and its schedule.

    Attributes:
      lr: peak learning rate of the adapter (mode `lora`) or the base (mode `full`).
      head_lr: peak learning rate of the task head; None means `lr`.
      schedule: `linear` or `cosine` decay to zero, or `constant`; each after the warm-up.
      warmup_ratio: share of all optimizer steps spent rising linearly from zero.
      weight_decay: decoupled; never on biases and norms.
      b1: Adam's decay rate of the mean of gradients.
      b2: Adam's decay rate of the mean of squared gradients.
      eps: Adam's epsilon, added to the root in the denominator.
      clip_norm: global-norm bound on the trainable part's gradient; None for no clipping.
    """

    lr: float = 1e-3
    head_lr: float | None = None
    schedule: str = "linear"
    warmup_ratio: float = 0.06
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = 1.0


@dataclass
class TrainConfig:
    """The loop.

    Attributes:
      mode: `lora` (adapter and head), `full` (everything) or `head` (the base as a frozen
        feature extractor). A language model has no head.
      epochs: passes over the training set.
      max_steps: train for this many optimizer steps, whatever `epochs` says.
      batch_size: examples an optimizer step.
      grad_accum: micro-batches a step is computed in; divides `batch_size`.
      eval_batch_size: examples a forward pass of the evaluation.
      precision: `fp32` or `bf16` compute; the trainable part and the optimizer stay fp32. On a
        GPU or TPU `fp32` products follow `jax_default_matmul_precision`, which is JAX's own
        default unless you set it.
      base_dtype: storage of the frozen base: `fp32`, `bf16`, or `int8` or `nf4` (4 bits) for the
        kernels of its layers and `precision` for the rest.
      remat: keep the inputs of layers alone, and compute each once more in the backward pass:
        less memory, more time, the same numbers.
      label_smoothing: share of each training target that is spread evenly over all classes, or
        words (Szegedy et al. 2016, arXiv:1512.00567); scores are never smoothed.
      max_shapes: most shapes of packed batches that the step is compiled for; few steps get fewer.
      prefix_cache_gib: keep what layers below the lowest trained one compute for each example, if
        it takes no more than so many GiB of the device's memory; 0 computes it in every step.
      pad_rank: store the adapter zero-padded to this rank, so that one compiled step serves a
        sweep over ranks; exact (the padding never receives a gradient). None: no padding.
      checkpoint_every: optimizer steps between checkpoints, besides one at each evaluation.
      checkpoint_minutes: most minutes between checkpoints; None: steps alone decide.
      keep_checkpoints: keep them when the trial has ended; they hold eight times what is trained.
      eval_every: optimizer steps between evaluations; None: at the end of each epoch. The last
        step is evaluated in any case.
      early_stopping: end after this many evaluations without a better dev metric; None: never.
      log_every: optimizer steps between records of the training loss.
      dropout_generator: what draws the masks of dropout, which the commands fill in where a rate
        is above zero: by another generator it is another trial. None: nothing draws, or threefry
        in a trial of an earlier version.
    """

    mode: str = "lora"
    epochs: int = 3
    max_steps: int | None = None
    batch_size: int = 32
    grad_accum: int = 1
    eval_batch_size: int = 64
    precision: str = "fp32"
    base_dtype: str = "fp32"
    remat: bool = False
    label_smoothing: float = 0.0
    max_shapes: int = 4
    prefix_cache_gib: float = 1.0
    pad_rank: int | None = None
    checkpoint_every: int | None = None
    checkpoint_minutes: float | None = 10.0
    keep_checkpoints: bool = False
    eval_every: int | None = None
    early_stopping: int | None = None
    log_every: int = 10
    dropout_generator: str | None = None


@dataclass
class TrackingConfig:
    """Where metrics go besides the JSONL that is always written.

    Attributes:
      kind: `jsonl` (nothing more), `wandb`, or `none` (the same as `jsonl`, and silent).
      project: the W&B project.
      entity: the W&B team or user; None takes the account's default.
    """

    kind: str = "jsonl"
    project: str = "lorax"
    entity: str | None = None


@dataclass
class HalvingConfig:
    """Successive halving inside a pack; off unless `after` is set.

    Attributes:
      after: optimizer steps before the first cut, which is made at the first evaluation from
        there on; the next ones at `eta` times as many steps each.
      eta: one trial in `eta` goes on at each cut: the better ones by the best dev metric so far.
    """

    after: int | None = None
    eta: int = 2


@dataclass
class MeshConfig:
    """How a pack is spread over the devices of a machine.

    Attributes:
      trial: devices that trials are spread over; None: all that the other axes leave.
      data: devices that the rows of a batch are spread over.
      fsdp: devices that a large frozen base is cut over.
    """

    trial: int | None = None
    data: int = 1
    fsdp: int = 1


@dataclass
class SweepConfig:
    """How trials are run together; nothing here changes a trial's numbers, save `halving`.

    Attributes:
      name: the directory, under `output_dir`, that the trials' directories lie in.
      plan: print how the trials would be packed, with the predicted cost, instead of training.
      memory_limit_gib: most memory a pack may take on a device; None: what the device reports.
      max_trials: most trials in a pack.
      lanes: trials computed side by side within a step; None lets the planner choose.
    """

    name: str = "default"
    plan: bool = False
    memory_limit_gib: float | None = None
    max_trials: int = 64
    lanes: int | None = None
    halving: HalvingConfig = field(default_factory=HalvingConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


@dataclass
class TrialConfig:
    """One training run. `lorax.runs.trial_id` names its directory by a hash of this.

    Attributes:
      seed: of the data order, the initial adapter and head, and dropout.
      output_dir: the folder of all sweeps; a trial's directory is `<output_dir>/<sweep.name>/<id>`.
    """

    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    seed: int = 0
    output_dir: str = "outputs"
