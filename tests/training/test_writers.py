"""The metric files after an interruption, read back by other means."""

import io
import json
from contextlib import closing

import numpy as np
from PIL import Image
from tensorboardX.proto import event_pb2

from gnvc_jax.training.metrics import Console, JsonLines, Many, TensorBoard


def test_json_lines_drop_what_will_be_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with closing(JsonLines(path, 0)) as writer:
        for step in (10, 20, 30):
            writer.write(step, {"loss": 1.0})
    with path.open("a") as crashed:
        crashed.write('{"step": 40, "lo')
    with closing(JsonLines(path, 20)) as writer:
        writer.write(30, {"loss": 2.0})
    read = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in read] == [(10, 1.0), (20, 1.0), (30, 2.0)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_gets_scalars_and_images(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (9, 5, 3), np.uint8)
    with closing(Many([Console(9), TensorBoard(tmp_path, 0)])) as writer:
        writer.write(7, {"loss": 0.5})
        writer.show(8, {"clip0/qp21": image})
    (file,) = tmp_path.iterdir()
    data, found = file.read_bytes(), []
    while data:  # records: uint64 length, its CRC, event, CRC
        length = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        found += [(event.step, v) for v in event.summary.value]
        data = data[16 + length :]
    (scalar_step, scalar), (image_step, shown) = found
    assert (scalar_step, scalar.tag, scalar.simple_value) == (7, "loss", 0.5)
    assert (image_step, shown.tag) == (8, "clip0/qp21")
    png = Image.open(io.BytesIO(shown.image.encoded_image_string))
    np.testing.assert_array_equal(np.asarray(png), image)


def test_console_tells_the_time_left_and_leaves_out_details(capsys):
    values = {"loss": 0.123456, "norm/grad_codec": 1.0, "step_s": 0.5}
    Console(steps=7300).write(100, values)
    assert capsys.readouterr().out == "step 100/7300  loss 0.1235  step_s 0.5  eta 1:00:00\n"
