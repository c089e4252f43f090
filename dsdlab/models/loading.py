"""From a model's name to an engine ready to run."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from dsdlab.models.base import Engine, ModelError, ModelInfo
from dsdlab.models.tokenizer import Tokenizer
from dsdlab.models.zoo import DRAFTERS, LLAMA_CPP, check_engine, fetch

DEFAULT_CONTEXT = 2048


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to load a model, whatever it is.

    precision: bf16, fp32, int8 or int4 (`llama:`: gguf); device: cpu, cuda or auto; slots: sessions at once;
    max_context: positions per session (cut to what the model was made for).
    """

    precision: str = "bf16"
    device: str = "auto"
    slots: int = 8
    max_context: int = DEFAULT_CONTEXT
    exact: bool = True


def load_tokenizer(name: str) -> Tokenizer | None:
    """The tokenizer of a target by model name; None for an emulated one."""
    if name.startswith("emulated:"):
        return None
    check_engine(name)
    return Tokenizer(fetch(name.removeprefix("hf:").removeprefix(LLAMA_CPP)) / "tokenizer.json")


def resolve_device(device: str) -> str:
    """'auto' becomes cuda where there is one. Raises ModelError for a device that is not there."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ModelError(f"device is {device!r}; allowed: auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("device is 'cuda' but torch sees no CUDA GPU; allowed here: cpu")
    return device


def load_engine(name: str, options: EngineOptions) -> Engine:
    """Load a target or drafter model. Raises ModelError with one clear line."""
    if name.startswith("emulated:"):
        from dsdlab.models.emulated import load_emulated

        return load_emulated(name.removeprefix("emulated:"), options.slots, options.max_context)
    device = resolve_device(options.device)
    if name.startswith(LLAMA_CPP):
        from dsdlab.models.llama_engine import load_llama

        return load_llama(name.removeprefix(LLAMA_CPP), options)
    if name.startswith("hf:"):
        from dsdlab.models.hf_engine import load_hf

        return load_hf(name.removeprefix("hf:"), replace(options, device=device))
    return _load_torch(name, replace(options, device=device))


def _load_torch(name: str, options: EngineOptions) -> Engine:
    from dsdlab.models.torch_engine import PRECISIONS, TorchEngine
    from dsdlab.models.weights_io import load_drafter_file, load_llama_dir

    if options.precision not in PRECISIONS:  # before anything is fetched
        raise ModelError(f"precision is {options.precision!r}; allowed: {', '.join(PRECISIONS)}")

    path = DRAFTERS.get(name, Path(name))
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise ModelError(f"model file {path} does not exist")
        weights = load_drafter_file(path)
        tokenizer = weights.tokenizer
        eos_ids: tuple[int, ...] = ()
    else:
        check_engine(name)
        folder = fetch(name)
        weights = load_llama_dir(folder, _cached_digest(folder))
        tokenizer = Tokenizer(folder / "tokenizer.json").fingerprint
        eos_ids = eos_of(folder)
    info = ModelInfo(
        model_id=name,
        tokenizer=tokenizer,
        vocab_size=weights.shape.vocab_size,
        max_context=min(options.max_context, weights.shape.max_context),
        eos_ids=eos_ids,
        precision=options.precision,
        n_params=weights.n_params,
        digest=weights.digest,
    )
    return TorchEngine(weights, info, slots=options.slots, device=options.device, exact=options.exact)


def eos_of(folder: Path) -> tuple[int, ...]:
    """End-of-sequence ids from a model folder's config.json (a number or a list there)."""
    eos = json.loads((folder / "config.json").read_text()).get("eos_token_id")
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (int(eos),)


def _cached_digest(folder: Path) -> str:
    """The weights' SHA-256, remembered beside them while size and time stay the same."""
    from dsdlab.models.weights_io import file_digest

    files = sorted(folder.glob("*.safetensors"))
    key = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    note = folder / ".digest.json"
    try:
        known = json.loads(note.read_text())
        if known["key"] == key:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    digest = file_digest(files)
    try:
        note.write_text(json.dumps({"key": key, "sha256": digest}))
    except OSError:  # a read-only model folder is fine
        return digest
    return digest
