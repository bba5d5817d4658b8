"""Kills, full disks and mutated inputs: `python scripts/campaign.py --minutes=3 --seed=0` (CONTRIBUTING, "Campaign").

Modules:
  main: the command. It divides the time between the kinds, and prints the table.
  kinds: the table of kinds.
  attempts: an attempt and its verdict.
  client, worker: the processes that run attempts, and those that start them.
  mutations: seeded mutations of bytes and JSON.
  data_files, checkpoint_files, settings_files, media_files, http_requests: kinds that mutate an input.
  kills, full_disks: kinds that stop programs. They use runs (a training run as a process) and mounts (limited disks).
"""
