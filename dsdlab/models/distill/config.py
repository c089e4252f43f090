"""What a distillation config file may say."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PromptConfig(_Strict):
    """Where prompts come from. Files hold one JSON object {"prompt": …} a line; the stem names the task."""

    files: list[str] = []
    builtin: bool = True
    self_written: dict[str, int] = {"chat": 1200, "code": 400, "maths": 400, "article": 200}
    article_tokens: tuple[int, int] = (120, 600)  # long prompts are cut to a random length in this range
    long_prompt_tokens: int = Field(default=300, ge=16)  # prompts above this are cut
    max_prompt_tokens: int = Field(default=1024, ge=16, le=8000)


class GenerateConfig(_Strict):
    """On-policy text: continuations per prompt, the first greedy and the rest sampled."""

    max_new_tokens: int = Field(default=128, ge=4, le=2048)
    batch: int = Field(default=128, ge=1)
    cache_positions: int = Field(default=50_000, ge=256)  # positions of key/value store per batch
    temperature: float = Field(default=0.8, gt=0, le=2)
    continuations: dict[str, int] = {"default": 3}
    token_budget: int = Field(default=1_000_000, ge=1)  # stop after this many generated tokens
    minutes: float = Field(default=0.0, ge=0)  # stop after this long; 0 = no limit


class ShapeConfig(_Strict):
    """Shape of the drafter. init: `layers` copies target layers, `slice` also narrows them; or `random`.

    With `file`, a drafter made before is trained on: its own shape counts, and none that is given here.
    """

    name: str = "picked-6"
    init: Literal["layers", "slice", "random"] = "layers"
    file: str = ""  # a drafter to begin with: a file or a shipped one's name
    hidden_size: int = Field(default=576, ge=32)
    intermediate_size: int = Field(default=1024, ge=32)
    layers: list[int] = [0, 1, 10, 20, 28, 29]  # target layers to start from (their count = depth)
    num_heads: int = Field(default=9, ge=1)
    num_kv_heads: int = Field(default=3, ge=1)
    head_dim: int = Field(default=64, ge=8)
    rows: int = Field(default=8192, ge=64)  # output vocabulary, also the rows of the input embedding
    export_rows: int = Field(default=0, ge=0)  # keep only this many of them in the file; 0 = all
    seed: int | None = None  # in place of the training seed
    overlap_weight: float | None = Field(default=None, ge=0)  # in place of that in [train]

    @model_validator(mode="after")
    def _check(self) -> ShapeConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if not self.layers:
            raise ValueError("layers must name at least one target layer")
        return self


class TrainConfig(_Strict):
    positions: int = Field(default=2_000_000, ge=1)  # judged positions, with repetition
    minutes: float = Field(default=0.0, ge=0)  # the schedule ends after this long if sooner; 0 = no limit
    batch_positions: int = Field(default=2048, ge=16)  # judged positions a step
    micro_tokens: int = Field(default=4096, ge=16)  # padded tokens a forward
    lr: float = Field(default=1.5e-3, gt=0)
    warmup: float = Field(default=0.03, ge=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0)
    hidden_weight: float = Field(default=0.0, ge=0)  # weight of the final-state match, fading to 0
    overlap_weight: float = Field(default=0.0, ge=0)  # weight of 1 - sum min(p, q), growing to the end
    overlap_from: float = Field(default=0.5, ge=0, lt=1)  # from this fraction on
    quantised_from: float = Field(
        default=1.0, ge=0, le=1
    )  # from this fraction on, forward through int8 weights
    checkpoint_minutes: float = Field(default=3.0, gt=0)
    judge_minutes: float = Field(default=6.0, gt=0)  # between points of the learning curve
    report_minutes: float = Field(default=1 / 3, gt=0)
    seed: int = 1


class EvalConfig(_Strict):
    """Held-out judging, and the costs that the choice between shapes assumes (CPU, one thread, ms)."""

    max_new_tokens: int = Field(default=96, ge=8)
    prompts_per_task: int = Field(default=48, ge=1)
    gamma: int = Field(default=4, ge=1, le=64)
    seeds: int = Field(default=3, ge=1)  # of the shared noise, for coupled acceptance
    t_verify_ms: float = Field(default=40.0, gt=0)  # the target, one row
    verify_slope: float = Field(default=0.04, ge=0)  # further rows cost this share of the first
    rtts_ms: list[float] = [0.0, 100.0]


class DistillConfig(_Strict):
    """One distillation: prompts, generation, shapes to train, evaluation."""

    target: str = "smollm2-135m-instruct"
    base: str = "SmolLM2-135M-Instruct"
    device: str = "auto"
    threads: int = Field(default=1, ge=1)
    seed: int = 1
    prompts: PromptConfig = PromptConfig()
    generate: GenerateConfig = GenerateConfig()
    shapes: list[ShapeConfig] = Field(default=[ShapeConfig()], min_length=1)
    train: TrainConfig = TrainConfig()
    final: TrainConfig | None = None  # the best shape is trained on like this
    evaluate: EvalConfig = EvalConfig()
    output: str = "drafter.safetensors"


def load_config(path: Path) -> DistillConfig:
    """Read a TOML config. Raises ValueError with one line naming file, field, value and what is allowed."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: not a TOML file ({error})") from None
    try:
        return DistillConfig.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(x) for x in first["loc"]) or "config"
        value = "" if first["type"] == "missing" else f" = {first['input']!r}"
        raise ValueError(f"{path}: {field}{value}: {first['msg']}") from None
