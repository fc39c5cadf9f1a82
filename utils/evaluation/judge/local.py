"""A judge that runs here: any language model in a local folder that transformers loads."""

from collections.abc import Mapping
from typing import Any

import torch

from utils.cli.errors import UserError
from utils.evaluation import fingerprints
from utils.evaluation.judge.asking import Judge

MAX_NEW_TOKENS = 512


class LocalJudge(Judge):
    """A language model in `folder`, greedy; nothing is fetched over the network and no code of the folder is run.

    device: "auto" is CUDA where there is one. UserError where the folder holds no model that can be loaded.
    """

    def __init__(self, folder: str, device: str = "auto") -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="auto")
            self._model = model.to(where).eval()
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"cannot load --judge_model {folder} on {where}: {reason}") from error
        self.facts: Mapping[str, Any] = {
            "kind": "local",
            "model": folder,
            "model_sha256": fingerprints.of_model(folder)["sha256"],
            "max_new_tokens": MAX_NEW_TOKENS,
        }

    def ask(self, prompt: str) -> str:
        """The reply, written in the model's own chat format where it has one."""
        if self._tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}]
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            inputs = self._tokenizer(text, return_tensors="pt", add_special_tokens=False)
        else:
            inputs = self._tokenizer(prompt, return_tensors="pt")
        ids = inputs["input_ids"].to(self._model.device)
        with torch.inference_mode():
            generated = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                pad_token_id=self._tokenizer.pad_token_id or 0,
            )
        return self._tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)
