"""``python -m cluster.job``."""

from cluster.job.command import app
from epslots.cli import run

if __name__ == "__main__":
    run(app)
