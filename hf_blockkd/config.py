"""Everything a person can set: `BlockwiseDistillConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from .config_values import DISTILLED, SAMPLINGS, SCHEDULES, STATE_BLOCKS, STONES, check_values, parse_indices
from .connectors.maps import CONNECTOR_KINDS, CONNECTOR_STARTS
from .losses.divergences import DIVERGENCES


@dataclass
class BlockwiseDistillConfig(TrainingArguments):
    r"""
    Configuration of the [`BlockwiseDistillTrainer`].

    It holds only what block-wise distillation adds; for all the other arguments, see
    [`~transformers.TrainingArguments`]. Four of them reach the teacher, too: `activation_checkpointing` also
    recomputes its layers in the stepping stones, `torch_compile` compiles the layers of both models one by one, and
    `fsdp` and ZeRO-3 of `deepspeed` shard both. With [`~transformers.HfArgumentParser`] every field can be given on the
    command line or in a YAML file.

    Parameters:
        > Parameters that are worth a thought in every run

        num_blocks (`int`, *optional*, defaults to `4`):
            Number of blocks n that both models are cut into, at most the depth of the shallower one. Ignored where
            boundaries are given.
        objective (`str`, *optional*, defaults to `"block_kd"`):
            What to train on: `"block_kd"`; `"ladder"`, which trains all stones as models to be kept; the baselines
            `"kd"` (plain knowledge distillation), `"alone"` (the task loss), `"hint"` (plain distillation and the
            squared error of connected states), `"simkd"`, `"fcfd"` and `"theseus"`; or a sum such as `"block_kd+hint"`.
            See `hf_blockkd.objectives`.
        temperature (`float`, *optional*, defaults to `2.0`):
            Temperature of all divergences, which are multiplied by its square. 4 suits images of few classes, 1
            vocabularies.
        task_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the task losses (cross-entropy and the like) of student and stones; less where few rows have a
            label, which are else learned by heart, or labels are noisy.

        > Advanced: parameters that control the blocks

        student_boundaries (`list[int]`, *optional*):
            Exclusive end layer of each student block, rising, the last one being the student's depth. Default: an even
            cut.
        teacher_boundaries (`list[int]`, *optional*):
            Likewise for the teacher.
        student_layers_path (`str`, *optional*):
            Dotted name of the student's `nn.ModuleList` of layers, where the search should not choose it.
        teacher_layers_path (`str`, *optional*):
            Likewise for the teacher.
        connector (`str`, *optional*, defaults to `"auto"`):
            Map from student width to teacher width: `"linear"`, `"mlp"`, `"identity"` (equal widths; made as the exact
            identity) or `"auto"` (`"identity"` where the widths are equal, else `"linear"`).
        connector_start (`str`, *optional*, defaults to `"least_squares"`):
            Where connectors begin: `"least_squares"`, corrected by the affine map that brings the student's states
            nearest to the teacher's, with a penalty on the change, fitted to 256 training examples before the first
            step, if there are as many and the teacher is not the student's own base; or as they were made, `"random"`,
            which for `"identity"` is zero beside the identity.

        connector_learning_rate (`float`, *optional*):
            Learning rate of the connectors, in optimizer groups of their own, with the weight decay of all others.
            Default: they train as all other weights do. Not with an optimizer of your own.

        train_connectors (`bool`, *optional*, defaults to `True`):
            Whether connectors change in training. With `connector="identity"` and `False` they stay the identity, and
            are not fitted either, so that every stone of two models of one width is a plain model.

        > Advanced: parameters that control the stepping stones

        stepping_stones (`str` or `list[int]`, *optional*, defaults to `"auto"`):
            Which stones take part in each step: `"last_two"`, stones n - 1 and n, which bring what all of them bring
            at about half the price; `"all"`; `"none"` (plain knowledge distillation, unless `state_blocks` are named or
            a `state_weight` is given); `"sample"` (a new draw at each optimizer step); `"share"` (the examples of a
            batch are shared out among the stones: each example runs through one); or a list of indices from 1 to n. On
            a command line, a list is written `1,3`. For `"sample"` and `"share"`, the weights of what is drawn rise by
            as much as it is drawn less often, which makes task and distillation terms unbiased estimates of those of
            `"all"`. `"auto"` runs none where states are compared (see `state_weight`), next to which stones brought
            nothing in any measurement, and `"last_two"` elsewhere, and where a field that is about stones is set:
            `stone_weight`, `cross_weight`, `stone_weighting`, `stone_fraction` or `stones_every`. With
            `objective="ladder"` it is `"sample"`.
        stones_per_step (`int`, *optional*, defaults to `1`):
            How many stones `"sample"` draws.
        stone_sampling (`str`, *optional*, defaults to `"weight"`):
            How often `"sample"` and `"share"` draw a stone: `"uniform"`; `"weight"`, in proportion to its weight; or
            `"cost"`, in proportion to its weight over the square root of its cost.
        stone_fraction (`float`, *optional*, defaults to `1.0`):
            Share of the examples of a batch, chosen at random, on which stones run at all, with weights divided by it.
        stones_every (`int`, *optional*, defaults to `1`):
            Stones run at one optimizer step in so many, with weights multiplied by it.
        stone_weighting (`str`, *optional*, defaults to `"halving"`):
            Weight of stone i next to other stones: `"halving"` is 2^-(n-i), `"uniform"` is 1.
        stone_weight (`float`, *optional*):
            `"block_kd"` only: what the losses of all stones count next to the student's; 0 runs no stone. Default: 1/3
            where connectors were fitted (see `connector_start`), 1, as published, elsewhere and with a `teacher_cache`.
        stone_schedule (`str`, *optional*):
            `"block_kd"` only: `"linear"` lets `stone_weight` and `state_weight` fall to 0 over the run; `"constant"` is
            published. Default: `"linear"` where connectors were fitted, `"constant"` elsewhere and with a
            `teacher_cache`.

        > Advanced: parameters that control the losses

        hint_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the squared error of connected states in `"hint"`, `"simkd"` and `"fcfd"`.
        distill_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the divergences from the teacher.
        cross_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the divergences from the mean logits of the stones. Off by default: it needs tuning of its own.
        state_weight (`float`, *optional*):
            `"block_kd"` only: weight of the squared error of connected states after each of `state_blocks`, relative to
            the teacher's; 0 is published. Default: 5, or 0.5 of models without a head and of students that
            [`make_student`] cut at the teacher's whole width, where connectors were fitted (see `connector_start`) or
            `state_blocks` are named, 0 elsewhere and with a `teacher_cache`, which does not keep states. Where
            you copied a student's layers yourself, give 0.5.
        state_blocks (`str` or `list[int]`, *optional*):
            `"block_kd"` and `"ladder"` only: after which blocks states are compared: `"last_two"`, `"all"` or a list of
            indices from 1 to n. Default: after those whose stones `stepping_stones` names, after the last two with
            `"auto"` (a ladder: all), and with `"none"` where a `state_weight` is given. After the last block, at those
            positions that the teacher's head reads.
        distill_on (`str`, *optional*, defaults to `"labelled"`):
            Over tokens, which positions are compared with the teacher in texts that have labels: `"labelled"`, those
            whose label is not -100; or `"all"` that are no padding, prompts included. Examples without any label are
            always compared everywhere.
        divergence (`str`, *optional*, defaults to `"forward_kl"`):
            `"forward_kl"`, `"reverse_kl"`, `"jsd"` or `"dkd"`.
        beta (`float`, *optional*, defaults to `0.5`):
            `"jsd"` only, and as in TRL's `GKDConfig`: share of the teacher in the mixture that both are compared with,
            and weight of its divergence from it; 0 is the forward and 1 the reverse KL. See
            `hf_blockkd.losses.divergences.jensen_shannon`.
        standardize_logits (`bool`, *optional*, defaults to `False`):
            Compare z-scores of the logits instead of the logits.
        embedding_loss (`str`, *optional*, defaults to `"cosine"`):
            Models without a head only, whose pooled states are compared: `"cosine"`, `"squared_error"` (as a share of
            the teacher's vector), `"similarity"` (of the cosines between the examples of a micro-batch, which needs
            vectors of no certain width), or a sum such as `"cosine+similarity"`.
        pooling (`str`, *optional*):
            Models without a head only, how their states become one vector: `"mean"`, `"cls"`, `"max"`, `"lasttoken"`,
            `"weightedmean"` or `"mean_sqrt_len_tokens"`, as sentence-transformers has them. Default: what the teacher's
            folder says, if it is one of that library, else `"mean"`.

        loss_chunk_size (`int`, *optional*):
            Language models only: number of tokens whose logits exist at a time, 0 for all. Default: as many as fill
            8 MiB in float32 on a CPU and 128 MiB elsewhere, where the batch has more. Losses and gradients do not
            depend on it.

        > Advanced: parameters that control what the student writes itself

        lmbda (`float`, *optional*, defaults to `0.0`):
            Causal language models only, and as in TRL's `GKDConfig`: share of the optimizer steps at which the student
            completes the prompts of the data itself, and learns from the teacher alone what should have followed. A
            prompt is what stands before the first label of an example. The student's own `generation_config` says how
            it writes: greedily, unless it says `do_sample=True`.
        max_new_tokens (`int`, *optional*, defaults to `128`):
            Most tokens of a completion.

        > Advanced: parameters that control the teacher cache

        teacher_cache (`str`, *optional*):
            Folder to keep the teacher's clean outputs in. It is filled before training, and training then runs the
            teacher for stepping stones only. The data must be the same in every epoch (no augmentation, no random
            masking). Several processes may fill it, and what it holds is not computed again; a `datasets.Dataset` that
            it was filled with is not even gone through again.
        teacher_cache_top_k (`int`, *optional*, defaults to `64`):
            Over vocabularies, number of likeliest tokens that are kept of each position, with the mass of all others as
            one more: 6 bytes each. Other tasks keep all logits in float32.
        captured_columns (`list[str]`, *optional*):
            Causal language models only: columns of the training set with the likeliest tokens that a server wrote of
            the teacher at temperature 1, which are distilled instead of the logits of a pass. Either one as vLLM's
            `prompt_logprobs`, or two of token ids and log probabilities; see `hf_blockkd.data.captured`. Without
            stepping stones the teacher is not run, and `teacher_model` may be `None`.

        > Advanced: parameters that control the evaluation

        eval_stepping_stones (`bool`, *optional*, defaults to `False`):
            Also evaluate the teacher and every stone at each evaluation, with metrics `eval_teacher_*` and
            `eval_stone_<i>_*`.
        predict_with_generate (`bool`, *optional*, defaults to `False`):
            Encoder-decoders only, and as in `Seq2SeqTrainingArguments`: metrics see the tokens that the student
            generates in evaluation instead of its logits.
        generation_max_length (`int`, *optional*):
            Most tokens of such a text. Default: as the student's `generation_config` says.
        generation_num_beams (`int`, *optional*):
            Beams of its search. Default: as the student's `generation_config` says.

    Raises:
        ValueError: For values that no model could be trained with; what depends on the models is checked by the
            trainer, before training.

    Example:
        ```python
        >>> from hf_blockkd import BlockwiseDistillConfig
        >>> BlockwiseDistillConfig(output_dir="student", num_blocks=3, temperature=4.0).stepping_stones
        'auto'

        ```
    """

    # The trainer gives every parameter a gradient; the search for unused ones walks through the graph at every step.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Passed to DistributedDataParallel; every parameter gets a gradient."}
    )

    num_blocks: int = field(default=4, metadata={"help": "Number of blocks that both models are cut into."})
    objective: str = field(
        default="block_kd",
        metadata={"help": "block_kd, ladder, kd, alone, hint, simkd, fcfd, theseus, or a sum of them."},
    )
    temperature: float = field(default=2.0, metadata={"help": "Temperature of all divergences."})
    task_weight: float = field(default=1.0, metadata={"help": "Weight of the task losses."})
    student_boundaries: list[int] | None = field(
        default=None, metadata={"help": "Exclusive end layer of each student block, the last one its depth."}
    )
    teacher_boundaries: list[int] | None = field(
        default=None, metadata={"help": "Exclusive end layer of each teacher block, the last one its depth."}
    )
    student_layers_path: str | None = field(
        default=None, metadata={"help": "Dotted name of the student's ModuleList of layers."}
    )
    teacher_layers_path: str | None = field(
        default=None, metadata={"help": "Dotted name of the teacher's ModuleList of layers."}
    )
    connector: str = field(
        default="auto", metadata={"help": "Map from student to teacher width.", "choices": list(CONNECTOR_KINDS)}
    )
    connector_start: str = field(
        default="least_squares", metadata={"help": "Where connectors begin.", "choices": list(CONNECTOR_STARTS)}
    )
    connector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the connectors; default: that of all."}
    )
    train_connectors: bool = field(
        default=True, metadata={"help": "Whether connectors change, or take part as they began."}
    )
    # In this order, and with a None that is refused, HfArgumentParser reads it as a string.
    stepping_stones: list[int] | str | None = field(
        default="auto",
        metadata={"help": "Stones that train: auto, last_two, all, none, sample, share, or indices such as 1,3."},
    )
    stones_per_step: int = field(default=1, metadata={"help": "How many stones `sample` draws at each step."})
    stone_sampling: str = field(
        default="weight", metadata={"help": "How often a stone is drawn.", "choices": list(SAMPLINGS)}
    )
    stone_fraction: float = field(default=1.0, metadata={"help": "Share of the examples on which stones run."})
    stones_every: int = field(default=1, metadata={"help": "Stones run at one optimizer step in so many."})
    stone_weighting: str = field(
        default="halving", metadata={"help": "Weight of stone i.", "choices": ["halving", "uniform"]}
    )
    stone_weight: float | None = field(
        default=None, metadata={"help": "Weight of all stones' losses; default: 1/3 where fitted, else 1."}
    )
    stone_schedule: str | None = field(
        default=None,
        metadata={
            "help": "Whether the weights of stones and states fall to 0; default: linear where fitted.",
            "choices": list(SCHEDULES),
        },
    )
    hint_weight: float = field(default=1.0, metadata={"help": "Weight of the squared error of connected states."})
    distill_weight: float = field(default=1.0, metadata={"help": "Weight of the divergences from the teacher."})
    cross_weight: float = field(default=0.0, metadata={"help": "Weight of the divergences from the stones' mean."})
    state_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the relative errors of connected states; default: 5 (no head: 0.5) where fitted."},
    )
    state_blocks: list[int] | str | None = field(
        default=None,
        metadata={"help": "Blocks after which states are compared: last_two, all, or indices; default: as stones."},
    )
    distill_on: str = field(
        default="labelled",
        metadata={"help": "Tokens that are compared with the teacher.", "choices": list(DISTILLED)},
    )
    divergence: str = field(
        default="forward_kl", metadata={"help": "How logits are compared.", "choices": list(DIVERGENCES)}
    )
    beta: float = field(default=0.5, metadata={"help": "Of jsd: 0 is the forward KL, 1 the reverse KL."})
    standardize_logits: bool = field(default=False, metadata={"help": "Compare z-scores of the logits."})
    embedding_loss: str = field(
        default="cosine", metadata={"help": "How vectors are compared: cosine, squared_error, similarity, or a sum."}
    )
    pooling: str | None = field(
        default=None, metadata={"help": "How states become a vector; default: as the teacher's folder says, or mean."}
    )
    loss_chunk_size: int | None = field(
        default=None, metadata={"help": "Tokens whose logits exist at a time; 0 for all."}
    )
    lmbda: float = field(default=0.0, metadata={"help": "Share of steps at which the student completes the prompts."})
    max_new_tokens: int = field(default=128, metadata={"help": "Most tokens that it writes after a prompt."})
    teacher_cache: str | None = field(default=None, metadata={"help": "Folder to keep the teacher's outputs in."})
    teacher_cache_top_k: int = field(default=64, metadata={"help": "Over vocabularies, tokens kept of each position."})
    captured_columns: list[str] | None = field(
        default=None, metadata={"help": "Columns of the training set with what a server wrote of the teacher."}
    )
    eval_stepping_stones: bool = field(
        default=False, metadata={"help": "Also evaluate the teacher and every stepping stone."}
    )
    predict_with_generate: bool = field(
        default=False, metadata={"help": "Metrics of encoder-decoders see the tokens that the student generates."}
    )
    generation_max_length: int | None = field(default=None, metadata={"help": "Most tokens of such a text."})
    generation_num_beams: int | None = field(default=None, metadata={"help": "Beams of its search."})

    def __post_init__(self) -> None:
        self.stepping_stones = parse_indices("stepping_stones", self.stepping_stones, STONES)
        if self.state_blocks is not None:
            self.state_blocks = parse_indices("state_blocks", self.state_blocks, STATE_BLOCKS)
        if isinstance(self.captured_columns, str):
            self.captured_columns = [self.captured_columns]
        check_values(self)
        super().__post_init__()
        if self.use_cache:
            raise ValueError(
                "`use_cache` is True, with which a student no longer keeps packed documents apart while its teacher, "
                "whose cache is off, does; set it to False."
            )
        if (self.activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "`activation_checkpointing_kwargs` asks for `use_reentrant=True`, which cuts the gradient between the "
                "stepping stones and the student; set it to False."
            )

    @property
    def pairing(self) -> dict[str, Any]:
        """What of it says how two models are fitted together: keyword arguments of `hf_blockkd.pairing.pair.Pair`."""
        names = ("num_blocks", "student_boundaries", "teacher_boundaries", "student_layers_path", "teacher_layers_path")
        own = {name: getattr(self, name) for name in (*names, "connector", "seed", "pooling", "embedding_loss")}
        return {**own, "recompute": bool(self.activation_checkpointing)}

    @property
    def seed_of_data(self) -> int:
        """`data_seed`, or `seed` where it is not set."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def stores_teacher(self) -> bool:
        """Whether the teacher's logits were stored before, so that nothing is known of its states."""
        return self.teacher_cache is not None or self.captured_columns is not None
