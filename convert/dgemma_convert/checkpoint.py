"""A checkpoint folder and the tensors in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from .errors import ConvertError
from .json_file import check_regular, is_there, read_json
from .safetensors_file import SafetensorsFile, StoredTensor
from .sources import LeftOut, same_bytes

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors\Z")
# A repository's name as it is written in commands, in addresses, and with a branch.
_REPOSITORY = re.compile(
    r"(?:https?:/{1,2})?(?:(?:www\.)?(?:huggingface\.co|hf\.co)/)?"
    r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?:[@:][\w.-]+|/(?:tree|blob|resolve)/.*|/)?\Z"
)
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
UNFINISHED = (".part", ".crdownload", ".incomplete", ".download", ".aria2", ".tmp")


def find_folder(src: Path) -> Path:
    """The folder that `src` means: itself, a file's, or the snapshot in a hub's cache folder.

    ConvertError where there is none.
    """
    if src.suffix.lower() == ".gguf" and src.is_file():
        raise ConvertError(f"{src}: is a GGUF file; `dgemma quantize` reads those")
    if src.suffix.lower() in ARCHIVES and src.is_file():
        raise ConvertError(f"{src}: is an archive; unpack it, and give the folder")
    if src.is_file():
        return src.parent
    if src.is_symlink() and not src.exists():
        check_regular(src)
    if not src.is_dir():
        offer = ""
        if match := _REPOSITORY.match(str(src)):
            name = match["name"]
            offer = f"; `dgemma convert {name} --remote` downloads the repository of that name"
        raise ConvertError(f"{src}: no such folder; expected a checkpoint with config.json{offer}")
    if not (src / "config.json").exists():
        if (src / "snapshots").is_dir():
            return _snapshot(src)
        if src.name == "snapshots" and (src.parent / "blobs").is_dir():
            return _snapshot(src.parent)
        if (src / "adapter_config.json").exists():
            raise ConvertError(
                f"{src}: is an adapter; give the folder of the model, and this one as --lora"
            )
        _offer_inner(src)
    return src


def _offer_inner(src: Path) -> None:
    """ConvertError where not the folder itself is a checkpoint, but one in it."""
    if any(src.glob("*.safetensors")):
        return
    inner = [path.parent for path in sorted(src.glob("*/config.json"))]
    inner += [path.parent for path in sorted(src.glob("models--*/snapshots"))]
    if inner:
        more = f", one of {len(inner)}" if len(inner) > 1 else ""
        raise ConvertError(f"{src}: not a checkpoint itself; did you mean {inner[0]}{more}?")


def _snapshot(cache: Path) -> Path:
    """The snapshot of a hub's cache folder that its branch `main` names, or else the latest."""
    named = cache / "refs" / "main"
    if named.is_file():
        name = named.read_text(encoding="utf-8", errors="replace").strip()
        if re.fullmatch(r"[0-9a-f]+", name) and (cache / "snapshots" / name).is_dir():
            return cache / "snapshots" / name
    found = [path for path in (cache / "snapshots").iterdir() if path.is_dir()]
    if not found:
        raise ConvertError(f"{cache}: a cache folder without a snapshot; download it again")
    return max(found, key=lambda path: path.stat().st_mtime)


class Checkpoint:
    """All tensors of a checkpoint folder, from one file or from the shards that the index names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self._files: list[SafetensorsFile] = []
        self._copies: list[StoredTensor] = []
        if not folder.is_dir():
            raise ConvertError(f"{folder}: no such folder; expected a checkpoint with config.json")
        try:
            if is_there(folder / INDEX_NAME):
                self._open_shards(folder / INDEX_NAME)
            else:
                for path in _weights(folder):
                    for tensor in self._open(path).tensors.values():
                        self._add(tensor)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes all files; safe to repeat."""
        for file in self._files:
            file.close()

    def check_unchanged(self) -> None:
        """ConvertError where any file changed since it was opened."""
        for file in self._files:
            file.check_unchanged()

    @property
    def left_out(self) -> Iterator[LeftOut]:
        """Tensors that are in several shards, but for the first of each."""
        if self._copies:
            yield LeftOut.of("copies in other shards", self._copies)

    def _add(self, tensor: StoredTensor) -> None:
        """A tensor may be in several files if it is the same in all."""
        first = self.tensors.setdefault(tensor.name, tensor)
        if first is tensor:
            return
        if not same_bytes(first, tensor):
            raise ConvertError(
                f"{self.folder}: tensor {tensor.name} is in two shards, {first.file.path.name} and "
                f"{tensor.file.path.name}, and differs"
            )
        self._copies.append(tensor)

    def _open(self, path: Path) -> SafetensorsFile:
        file = SafetensorsFile(path)
        self._files.append(file)
        return file

    def _open_shards(self, path: Path) -> None:
        index = read_json(path)
        places = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
            raise ConvertError(f"{path}: needs a weight_map from tensor names to file names")
        names = sorted(set(places.values()))
        for name in names:
            if Path(name).name != name or name in ("", ".", ".."):
                raise ConvertError(f"{path}: names {name!r}, which is not a file of the folder")
        missing = [name for name in names if not is_there(self.folder / name)]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ConvertError(
                f"{path}: names the shard {missing[0]}{more}, which is missing; download it"
            )
        for name in names:
            for tensor in self._open(self.folder / name).tensors.values():
                if tensor.name not in places:
                    raise ConvertError(f"{path}: says nothing of tensor {tensor.name} in {name}")
                self._add(tensor)
        for tensor_name, name in places.items():
            if tensor_name not in self.tensors:
                raise ConvertError(f"{path}: says that {tensor_name} is in {name}, but it is not")


def _weights(folder: Path) -> list[Path]:
    """The files with weights of a folder without an index."""
    if is_there(folder / SINGLE_NAME):
        return [folder / SINGLE_NAME]
    found = sorted(
        path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_")
    )
    for path in found:
        check_regular(path)
    shards = [match for path in found if (match := _SHARD.match(path.name))]
    if shards:
        stems = {(match[1], match[3]) for match in shards}
        if len(stems) > 1:
            raise ConvertError(
                f"{folder}: has shards of {len(stems)} models and no {INDEX_NAME}; expected one"
            )
        stem, count = stems.pop()
        for number in range(1, int(count) + 1):
            name = f"{stem}-{number:05d}-of-{count}.safetensors"
            if not (folder / name).is_file():
                raise ConvertError(f"{folder}: the shard {name} is missing; download it")
        return [folder / match[0] for match in shards]
    if not found:
        others = [path.name for path in folder.glob("*.bin")] + [
            path.name for path in folder.glob("*.gguf")
        ]
        hint = f", but {others[0]}: weights are read from safetensors files" if others else ""
        unfinished = [path.name for path in folder.iterdir() if path.suffix in UNFINISHED]
        if unfinished:
            hint = f", but {unfinished[0]}: its download is not finished; start it again"
        raise ConvertError(f"{folder}: has neither {SINGLE_NAME} nor {INDEX_NAME}{hint}")
    return found
