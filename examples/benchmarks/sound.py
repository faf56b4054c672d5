"""Digits that eSpeak NG speaks: students that classify a sound, and that write what is said (CTC, or a Whisper).

    pip install --no-deps espeakng-loader
    python examples/benchmarks/sound.py --task classes
    python examples/benchmarks/sound.py --task ctc
    python examples/benchmarks/sound.py --task text --train_sounds 2000 --teacher_steps 1500 --teacher_rate 1e-3

It is synthesised speech of a known text, in white noise, and no recording. Voices, rates and pitches are drawn for each
sound; five of the voices speak in the test alone. Teachers are trained from scratch, on one core; students begin fresh,
or cut out of them.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from methods import COMPARED
from transformers import HfArgumentParser, PreTrainedModel, set_seed
from transformers.audio_utils import mel_filter_bank

from hf_blockkd import BlockwiseDistillConfig, BlockwiseDistillTrainer, make_student

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOICES = [f"{voice}+{variant}" for voice in ("en-us", "en", "en-gb-scotland") for variant in ("m1", "m3", "f1", "f3")]
TEST_VOICES = [f"en-gb-x-rp+{variant}" for variant in ("m2", "m4", "f2", "f4", "f5")]
MELS, WINDOW, HOP = 32, 512, 256


@dataclass
class SoundArguments:
    task: Literal["classes", "ctc", "text"] = "classes"
    output_dir: Path = Path("outputs/sound")
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    methods: list[str] | None = field(default=None, metadata={"help": "Default: all that are compared."})
    train_sounds: int = 600
    test_sounds: int = 200
    teacher_steps: int = 600
    teacher_rate: float = 2e-3
    student_steps: int = 300
    learning_rates: list[float] = field(default_factory=lambda: [2e-3])
    starts: list[str] = field(default_factory=lambda: ["fresh"], metadata={"help": "Of students: fresh, cut, or both."})


class Speaker:
    """eSpeak NG as a Python function from a text to samples."""

    def __init__(self) -> None:
        import espeakng_loader

        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._chunks: list[np.ndarray] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._keep = kind(self._take)
        self.rate = self.library.espeak_Initialize(2, 0, espeakng_loader.get_data_path().encode(), 0)
        self.library.espeak_SetSynthCallback(self._keep)

    def _take(self, samples: Any, count: int, events: Any) -> int:
        if count:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def __call__(self, text: str, voice: str, rate: int, pitch: int) -> np.ndarray:
        """Samples from -1 to 1."""
        self._chunks.clear()
        if self.library.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"eSpeak NG has no voice {voice!r}.")
        self.library.espeak_SetParameter(1, rate, 0)
        self.library.espeak_SetParameter(3, pitch, 0)
        data = text.encode()
        self.library.espeak_Synth(data, len(data) + 1, 0, 1, 0, 1, None, None)
        return np.concatenate(self._chunks) / 32768


def sounds(count: int, voices: list[str], length: Callable[[np.random.Generator], int], seed: int) -> list[dict]:
    """Log-mel spectrograms (T, `MELS`) of so many spoken numbers, with their digits."""
    speaker, draw, rows = Speaker(), np.random.default_rng(seed), []
    mels = torch.tensor(
        mel_filter_bank(WINDOW // 2 + 1, MELS, 0.0, speaker.rate / 2, speaker.rate), dtype=torch.float32
    )
    for _ in range(count):
        digits = draw.integers(10, size=length(draw)).tolist()
        voice, rate, pitch = (
            voices[draw.integers(len(voices))],
            int(draw.integers(150, 260)),
            int(draw.integers(20, 80)),
        )
        wave = speaker(" ".join(DIGITS[digit] for digit in digits), voice, rate, pitch)
        wave = torch.tensor(wave + draw.normal(size=len(wave)) * 0.05, dtype=torch.float32)
        spectrum = torch.stft(wave, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True).abs() ** 2
        features = (spectrum.T @ mels).clamp(min=1e-4).log()
        rows.append({"features": (features - features.mean()) / features.std(), "digits": digits})
    return rows


@dataclass(frozen=True)
class Kind:
    """A task: its models by width and depth, its batches, and how good some predictions are.

    `stacks` are the layers that a cut halves, one after the other; `settings` and `methods` are more fields of the
    configuration for all runs, and for some that are compared.
    """

    build: Callable[[int, int], PreTrainedModel]
    length: Callable[[np.random.Generator], int]
    collate: Callable[[list[dict]], dict[str, torch.Tensor]]
    score: Callable[[Any], dict[str, float]]
    stacks: tuple[str | None, ...] = (None,)
    settings: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=lambda: COMPARED)


FRAMES, TEXT_FRAMES = 64, 120
BEGIN, END, PAD = 10, 11, 12
"""Tokens of texts, beside the digits."""
ENCODER, DECODER = "model.encoder.layers", "model.decoder.layers"
LAYERS_PATHS = ("student_layers_path", "teacher_layers_path")


def _spectrogram_transformer(width: int, depth: int) -> PreTrainedModel:
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": 4, "intermediate_size": 2 * width}
    patches = {"patch_size": 8, "time_stride": 8, "frequency_stride": 8, "max_length": FRAMES, "num_mel_bins": MELS}
    return transformers.ASTForAudioClassification(transformers.ASTConfig(**sizes, **patches, num_labels=10))


def _conformer(width: int, depth: int) -> PreTrainedModel:
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": 4, "intermediate_size": 2 * width}
    encoder = {
        **sizes,
        "num_mel_bins": MELS,
        "subsampling_conv_channels": 32,
        "subsampling_factor": 4,
        "layerdrop": 0.0,
    }
    config = transformers.ParakeetCTCConfig(vocab_size=11, pad_token_id=10, encoder_config=encoder)
    config.ctc_loss_reduction = "mean"
    return transformers.ParakeetForCTC(config)


def _whisper(width: int, depth: int) -> PreTrainedModel:
    sizes = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in {"layers": depth, "attention_heads": 4, "ffn_dim": 2 * width}.items()
    }
    tokens = {"decoder_start_token_id": BEGIN, "bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD}
    lengths = {"num_mel_bins": MELS, "max_source_positions": TEXT_FRAMES // 2, "max_target_positions": 8}
    config = transformers.WhisperConfig(vocab_size=13, d_model=width, **sizes, **tokens, **lengths)
    return transformers.WhisperForConditionalGeneration(config)


def _one_length(rows: list[dict], frames: int = FRAMES) -> torch.Tensor:
    features = torch.zeros(len(rows), frames, MELS)
    for own, row in zip(features, rows, strict=True):
        own[: len(row["features"])] = row["features"][:frames]
    return features


def _named(rows: list[dict]) -> dict[str, torch.Tensor]:
    return {"input_values": _one_length(rows), "labels": torch.tensor([row["digits"][0] for row in rows])}


def _written(rows: list[dict]) -> dict[str, torch.Tensor]:
    texts = [torch.tensor([*row["digits"], END]) for row in rows]
    labels = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=-100)
    return {"input_features": _one_length(rows, TEXT_FRAMES).mT.contiguous(), "labels": labels}


def _padded(rows: list[dict]) -> dict[str, torch.Tensor]:
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_features": pad([row["features"] for row in rows], batch_first=True),
        "attention_mask": pad([torch.ones(len(row["features"]), dtype=torch.long) for row in rows], batch_first=True),
        "labels": pad([torch.tensor(row["digits"]) for row in rows], batch_first=True, padding_value=-100),
    }


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": 100 * float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def _errors(heard: list[list[int]], label_ids: np.ndarray) -> dict[str, float]:
    """Edits for each digit that was said."""
    edits = said = 0
    for digits, labels in zip(heard, label_ids, strict=True):
        truth = [int(one) for one in labels if 0 <= one < len(DIGITS)]
        row = list(range(len(truth) + 1))
        for i, one in enumerate(digits, start=1):
            before, row[0] = row[0], i
            for j, other in enumerate(truth, start=1):
                before, row[j] = row[j], min(before + (one != other), row[j] + 1, row[j - 1] + 1)
        edits, said = edits + row[-1], said + len(truth)
    return {"digit_error_rate": 100 * edits / said}


def _errors_of_frames(prediction: Any) -> dict[str, float]:
    """Greedily decoded."""
    heard = []
    for frames in prediction.predictions:
        best = np.where(frames[:, 0] == -100, 10, frames.argmax(-1))  # -100 is what batches are padded with
        heard.append([int(one) for i, one in enumerate(best) if one != 10 and (i == 0 or one != best[i - 1])])
    return _errors(heard, prediction.label_ids)


def _errors_of_texts(prediction: Any) -> dict[str, float]:
    texts = [[int(one) for one in text if 0 <= one < len(DIGITS)] for text in prediction.predictions]
    return _errors(texts, prediction.label_ids)


KINDS = {
    "classes": Kind(_spectrogram_transformer, lambda draw: 1, _named, _accuracy),
    "ctc": Kind(
        _conformer,
        lambda draw: int(draw.integers(2, 5)),
        _padded,
        _errors_of_frames,
        settings={"per_device_eval_batch_size": 1},  # what a model writes in padding is none of its errors
    ),
    "text": Kind(
        _whisper,
        lambda draw: int(draw.integers(2, 4)),
        _written,
        _errors_of_texts,
        stacks=(ENCODER, DECODER),
        settings={"predict_with_generate": True, "generation_max_length": 6},
        methods=COMPARED | {"the default, in the encoder": dict.fromkeys(LAYERS_PATHS, ENCODER)},
    ),
}


def main() -> None:
    (script,) = HfArgumentParser(SoundArguments).parse_args_into_dataclasses()
    kind, folder = KINDS[script.task], script.output_dir / script.task
    train = sounds(script.train_sounds, VOICES, kind.length, seed=0)
    test = sounds(script.test_sounds, TEST_VOICES, kind.length, seed=1)

    def run(
        name: str,
        start: str,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        steps: int,
        seed: int,
        rate: float,
        **fields: Any,
    ) -> None:
        args = BlockwiseDistillConfig(
            folder / "run",
            max_steps=steps,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=50,
            learning_rate=rate,
            warmup_steps=steps // 10,
            num_blocks=2,
            seed=seed,
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            logging_steps=100,
            disable_tqdm=True,
            **kind.settings,
            **fields,
        )
        trainer = BlockwiseDistillTrainer(
            model=model,
            teacher_model=teacher,
            args=args,
            data_collator=kind.collate,
            train_dataset=train,
            eval_dataset=test,
            compute_metrics=kind.score,
        )
        begin = time.perf_counter()
        if steps:
            trainer.train()
        row = {"task": script.task, "method": name, "start": start, "seed": seed, "learning_rate": rate, "steps": steps}
        row["seconds"] = round(time.perf_counter() - begin)
        metrics = {key: round(value, 4) for key, value in trainer.evaluate().items()}
        row |= {
            name: metrics[name] for name in ("eval_loss", "eval_accuracy", "eval_digit_error_rate") if name in metrics
        }
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "runs.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    set_seed(0)
    saved, teacher = folder / "teacher", kind.build(96, 4)
    if saved.exists():
        teacher = type(teacher).from_pretrained(saved, trust_remote_code=False)
    else:
        # What learns alone asks nothing of a teacher.
        other = kind.build(96, 4)
        run("teacher", "fresh", teacher, other, script.teacher_steps, 0, script.teacher_rate, objective="alone")
        teacher.save_pretrained(saved)
    for start in script.starts:
        student = teacher
        for path in kind.stacks if start == "cut" else ():
            cut = {"num_layers": 2, "hidden_size": 48, "layers_path": path}
            student = make_student(student, **cut, data=train, data_collator=kind.collate)
        if start == "cut":
            run("cut, before training", start, copy.deepcopy(student), teacher, 0, 0, 0.0, objective="alone")
        for seed, rate in itertools.product(script.seeds, script.learning_rates):
            for name in script.methods or kind.methods:
                set_seed(seed)
                begin = copy.deepcopy(student) if start == "cut" else kind.build(48, 2)
                run(name, start, begin, teacher, script.student_steps, seed, rate, **kind.methods[name])


if __name__ == "__main__":
    main()
