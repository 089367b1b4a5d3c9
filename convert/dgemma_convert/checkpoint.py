"""A checkpoint folder and the tensors in it."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from .errors import ConvertError
from .json_file import read_json
from .safetensors_file import SafetensorsFile, StoredTensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class Checkpoint:
    """All tensors of a checkpoint folder, from one file or from the shards that the index names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self._files: list[SafetensorsFile] = []
        if not folder.is_dir():
            raise ConvertError(f"{folder}: no such folder; expected a checkpoint with config.json")
        try:
            if (folder / INDEX_NAME).exists():
                self._open_shards(folder / INDEX_NAME)
            elif (folder / SINGLE_NAME).exists():
                self.tensors.update(self._open(folder / SINGLE_NAME).tensors)
            else:
                raise ConvertError(f"{folder}: has neither {SINGLE_NAME} nor {INDEX_NAME}")
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

    def _open(self, path: Path) -> SafetensorsFile:
        file = SafetensorsFile(path)
        self._files.append(file)
        return file

    def _open_shards(self, path: Path) -> None:
        index = read_json(path)
        places = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
            raise ConvertError(f"{path}: needs a weight_map from tensor names to file names")
        for name in sorted(set(places.values())):
            if Path(name).name != name or name in ("", ".", ".."):
                raise ConvertError(f"{path}: names {name!r}, which is not a file of the folder")
            if not (self.folder / name).is_file():
                raise ConvertError(f"{path}: names the shard {name}, which is missing; download it")
            for tensor in self._open(self.folder / name).tensors.values():
                if tensor.name in self.tensors:
                    raise ConvertError(f"{self.folder}: tensor {tensor.name} is in two shards")
                if places.get(tensor.name) != name:
                    raise ConvertError(f"{path}: says nothing of tensor {tensor.name} in {name}")
                self.tensors[tensor.name] = tensor
        for tensor_name, name in places.items():
            if tensor_name not in self.tensors:
                raise ConvertError(f"{path}: says that {tensor_name} is in {name}, but it is not")
