"""Kills, full disks and mutated files: `python scripts/campaign.py --minutes=3 --seed=0` (CONTRIBUTING, "Campaign")."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from campaign.main import cli

if __name__ == "__main__":
    cli()
