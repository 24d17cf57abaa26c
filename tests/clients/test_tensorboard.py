"""The real TensorBoard reads a run's curves: while it goes on, after it was killed, and after it went on."""

import json
import pathlib
import subprocess
import sys
import time

from conftest import OURS, write_job

READER = pathlib.Path(__file__).parents[2] / "bench" / "tensorboard_read.py"
TAGS = ["train/loss", "train/learning_rate", "train/gradient_norm"]


def curves(folder, *tags):
    """What TensorBoard finds in a folder; it has to find the tags."""
    read = subprocess.run([sys.executable, READER, folder, *tags], check=True, timeout=120, capture_output=True, text=True)
    return json.loads(read.stdout)


def steps(folder, tag):
    return [step for step, _ in curves(folder, tag)["scalars"][tag]]


def wait_for(process, found):
    for _ in range(3000):
        result = found()
        if result:
            return result
        assert process.poll() is None, "athanor-trainer ended"
        time.sleep(0.05)
    raise TimeoutError("nothing in 150 s")


def test_a_killed_run_that_goes_on_has_each_step_once(tmp_path, rows):
    total = 40
    job = write_job(
        tmp_path, rows[:300], {"maxSteps": total, "batchSize": 8, "maxSequenceLength": 32}, checkpoint={"everySteps": 7}
    )
    with subprocess.Popen(job, env=OURS) as process:
        try:
            wait_for(process, lambda: list(tmp_path.glob("out/*/checkpoints/*/step-*/manifest.json")))
            (file,) = tmp_path.glob("out/*/tensorboard/events.*")
            size = file.stat().st_size
            # So that steps beyond the checkpoint are there.
            wait_for(process, lambda: file.stat().st_size > size + 400)
        finally:
            process.kill()
    # As if the machine had died with it: half a record takes nothing along.
    file.write_bytes(file.read_bytes()[:-7])
    killed = steps(file.parent, "train/loss")
    assert killed == list(range(1, len(killed) + 1)) and 7 < len(killed) < total

    subprocess.run(job, check=True, timeout=300, env=OURS)
    found = curves(file.parent, *TAGS, "validation/accuracy")
    for tag in TAGS:
        assert [step for step, _ in found["scalars"][tag]] == list(range(1, total + 1)), tag
    assert found["scalars"]["validation/accuracy"][-1][0] == total
    assert "hparams" in found["plugins"].values()
    # What was written beyond the checkpoint is in both files, and void in the first.
    assert len(list(file.parent.iterdir())) == 2


def test_the_artifact_has_its_curves(artifact):
    assert steps(artifact / "tensorboard", "train/loss") == list(range(1, 26))
