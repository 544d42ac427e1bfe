"""Training, on what the method has made: the scorer, the fine-tuned model, and the merge of its adapter into its base.

The only room with torch. It knows neither settings nor the results folder: scripts pass it data, rules and paths. What
torch and its relatives read when they are imported is set here.
"""

import logging
import os
import warnings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait slow down other work
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
for _name in ("bitsandbytes", "huggingface_hub", "torch.distributed", "torch.utils.checkpoint"):
    logging.getLogger(_name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore")  # users see AugCon's own lines
