"""From a checkpoint folder to a GGUF file, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from gguf import LlamaFileType

from dgemma.importance import Importance

from .checkpoint import Checkpoint, find_folder
from .config import read_config
from .errors import failing_in_words
from .lora import Adapter
from .metadata import Keys, ParameterCounts, checkpoint_keys, folder_name, read_overrides
from .policy import DEFAULT_MIX, make_policy
from .production import Report, Target, produce
from .quantized import read_sources
from .sources import LeftOut
from .tensors import map_tensors


def convert(
    src: Path,
    outfile: Path | None = None,
    outtype: str = DEFAULT_MIX,
    *,
    token_embedding_type: str | None = None,
    tensor_types: Sequence[str] = (),
    threads: int = 0,
    model_name: str | None = None,
    metadata: Path | None = None,
    imatrix: Path | None = None,
    lora: Path | None = None,
    lora_scale: float = 1.0,
    split_max_size: int = 0,
    force: bool = False,
    dry_run: bool = False,
    progress: bool = True,
) -> Report:
    """Converts the checkpoint folder `src` to the GGUF file `outfile`.

    outfile         None: a name made of the model's and the type's, in the working directory; a
                    folder: that name in it.
    outtype         one of `policy.MIXES`.
    tensor_types    exceptions, "REGEX=TYPE"; the first that is found in a tensor's name decides.
    threads         0: one a physical core.
    metadata        JSON file with `general.*` keys that come before those of the model card.
    imatrix         GGUF file with an importance matrix.
    lora            folder of a LoRA adapter to merge, multiplied by lora_scale.
    split_max_size  bytes of a shard; 0: one file.
    dry_run         only says what would be written.
    progress        shows a bar on standard error, if that is a terminal.

    Raises ConvertError. An existing file is replaced only with `force`, and only once the new one
    is whole. Memory does not grow with the model.
    """
    with failing_in_words("converting"), ExitStack() as stack:
        policy = make_policy(outtype, tensor_types, token_embedding_type)
        src, notes = find_folder(src.expanduser()), list[str]()
        general = {"name": folder_name(src)}
        if metadata is not None:
            general |= read_overrides(metadata)
        if model_name:
            general["name"] = model_name
        target = Target(
            _target_path(outfile, general["name"], outtype),
            split_max_size,
            threads,
            force,
            dry_run,
            progress,
        )
        checkpoint = stack.enter_context(Checkpoint(src))
        config = read_config(src)
        sources = read_sources(checkpoint)
        checks = [checkpoint.check_unchanged]
        adapted: list[LeftOut] = []
        if lora is not None:
            adapter = stack.enter_context(Adapter(lora, lora_scale))
            sources = replace(sources, tensors=adapter.merge(sources.tensors))
            checks.append(adapter.check_unchanged)
            adapted = adapter.unused()
        mapped = map_tensors(config, checkpoint, sources)

        def keys(file_type: LlamaFileType, counts: ParameterCounts) -> Keys:
            return checkpoint_keys(src, config, file_type, counts, general, notes)

        return produce(
            mapped.tensors,
            policy,
            keys,
            target,
            n_experts=config.experts,
            importance=None if imatrix is None else Importance(imatrix),
            left_out=[*mapped.left_out, *adapted],
            checks=checks,
            notes=notes,
        )


def _target_path(outfile: Path | None, name: str, outtype: str) -> Path:
    """Where to write: `outfile`, or a name that says model and type."""
    if outfile is not None and not outfile.is_dir():
        return outfile
    safe = name.replace("/", "-").replace(" ", "-")
    return (outfile or Path()) / f"{safe}-{outtype.upper()}.gguf"
