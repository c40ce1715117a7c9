"""Load a checkpoint with stock transformers and answer with its log-probabilities. Run by path, without packlight,
unless it is asked to import it.

stdin: {"path", "ids", "top_ids", "max_tokens"}, where `top_ids` asks about some tokens after each of the last
positions, and "imports" where modules are to be imported before; the last line of stdout: {"log_probs", "tokens",
"imported"}.
"""

import importlib
import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM

asked: Any = json.loads(sys.stdin.read())
for name in asked.get("imports", ()):
    importlib.import_module(name)
loaded: Any = AutoModelForCausalLM.from_pretrained(asked["path"], output_loading_info=True, local_files_only=True)
model, info = loaded
wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
if wrong:
    raise SystemExit(f"tensors did not fit: {wrong}")
model.eval()
ids = torch.tensor([asked["ids"]])
with torch.inference_mode():
    top_ids = torch.tensor(asked["top_ids"])  # (positions, recorded)
    logits = model(ids, use_cache=False).logits[0, -len(top_ids) :].float()
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=asked["max_tokens"],
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
print(
    json.dumps(
        {
            "log_probs": torch.log_softmax(logits, dim=-1).gather(1, top_ids).tolist(),
            "tokens": made[0, ids.shape[1] :].tolist(),
            "imported": "packlight" in sys.modules,
        }
    )
)
