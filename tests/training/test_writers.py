"""The metric files after an interruption, read back by other means."""

import json
from contextlib import closing

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


def test_tensorboard_gets_the_scalars(tmp_path):
    with closing(Many([TensorBoard(tmp_path, 0)])) as writer:
        writer.write(7, {"loss": 0.5})
    (file,) = tmp_path.iterdir()
    data, scalars = file.read_bytes(), []
    while data:  # records: uint64 length, its CRC, event, CRC
        length = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        scalars += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        data = data[16 + length :]
    assert scalars == [(7, "loss", 0.5)]


def test_console_tells_the_time_left(capsys):
    Console(steps=7300).write(100, {"loss": 0.123456, "step_s": 0.5})
    assert capsys.readouterr().out == "step 100/7300  loss 0.1235  step_s 0.5  eta 1:00:00\n"
