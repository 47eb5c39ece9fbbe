"""Use the installed wheel from an empty folder: import everything, run the command."""

import importlib
import os
import pkgutil
import subprocess
import sys
import tempfile

folder = tempfile.mkdtemp()
os.chdir(folder)  # nothing of the checkout is on the path
sys.path[0] = folder

import safestep  # noqa: E402
from safestep.runlog import RunLog  # noqa: E402

assert "site-packages" in (safestep.__file__ or ""), safestep.__file__
names = [module.name for module in pkgutil.walk_packages(safestep.__path__, "safestep.")]
for name in names:
    if name != "safestep.__main__":  # runs the command
        importlib.import_module(name)

with RunLog("run", {"max_normalized_step": 1.0}) as log:
    for step in range(60):
        loss = 1.0 + 0.01 * (step % 3)
        log.write("step", {"step": step, "normalized_step": 0.5, "scale": 1.0, "loss": loss})

for command in (["demo", "--help"], ["report", "run"]):
    subprocess.run(["safestep", *command], check=True, stdout=subprocess.DEVNULL)
assert os.path.getsize("run/report/report.html") > 10_000
sys.stdout.write(f"{len(names)} modules, the demo's help and a report from the wheel\n")
