import json
from offload.blocks import Extent
from offload.elements import BY_NAME
from offload.models.checkpoint.base import Checkpoint, TensorInfo


def open_checkpoint(folder):
    config = json.loads((folder / "config.json").read_text())
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    head = json.loads(raw[8 : 8 + n])
    t = {
        k: TensorInfo(
            name=k,
            element=BY_NAME[v["dtype"]],
            shape=tuple(v["shape"]),
            extent=Extent(
                path=path, offset=8 + n + v["data_offsets"][0], nbytes=v["data_offsets"][1] - v["data_offsets"][0]
            ),
        )
        for k, v in head.items()
        if k != "__metadata__"
    }
    return Checkpoint(
        path=folder,
        format="huggingface",
        files=(path,),
        architecture=config["model_type"],
        metadata=config,
        tensors=t,
        fingerprint="",
    )
