"""The trainer, which watches for maintenance as on TPUs. Used by test_maintenance.py."""

from EasyLM.models.llama import llama_train
from EasyLM.training import maintenance

maintenance._PLATFORM = "cpu"
llama_train.cli()
