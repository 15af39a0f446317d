"""A small server with the part of vLLM's HTTP interface that rollouts use, on a real base with real adapters."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

Answer = tuple[int, Any]


class StandIn:
    """Serves a base under the name `base`. Its flags make it the servers that a run has to notice."""

    def __init__(self, base: Path, port: int = 0) -> None:
        self.base, self.tokenizer = base, AutoTokenizer.from_pretrained(base)
        self.model: Any = AutoModelForCausalLM.from_pretrained(base).eval()
        self.adapters: dict[str, Any] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.lock = threading.Lock()
        self.ignores_adapters = self.takes_no_adapters = self.is_raw = False
        self.max_model_len = 512
        self.before: Callable[[str, dict[str, Any]], Answer | None] = lambda path, asked: None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(*outer.listed())

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.asked.append((self.path, asked))
                    self.answer(*(outer.before(self.path, asked) or outer.posted(self.path, asked)))

            def answer(self, status: int, body: Any) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def listed(self) -> Answer:
        data = [{"id": "base", "root": str(self.base), "parent": None, "max_model_len": self.max_model_len}]
        return 200, {"data": data + [{"id": name, "root": name, "parent": "base"} for name in self.adapters]}

    def posted(self, path: str, asked: dict[str, Any]) -> Answer:
        return self.completed(asked) if path == "/v1/completions" else self.managed(path, asked)

    def managed(self, path: str, asked: dict[str, Any]) -> Answer:
        if path == "/tokenize":
            return 200, {"tokens": self.tokenizer(asked["prompt"], add_special_tokens=False)["input_ids"]}
        if path == "/v1/load_lora_adapter":
            if self.takes_no_adapters:
                return 404, {"detail": "Not Found"}
            model = AutoModelForCausalLM.from_pretrained(self.base)
            self.adapters[asked["lora_name"]] = PeftModel.from_pretrained(model, asked["lora_path"]).eval()
            return 200, {}
        return (200, {}) if self.adapters.pop(asked["lora_name"], None) else (404, {"error": {"message": "no"}})

    def completed(self, asked: dict[str, Any]) -> Answer:
        if asked["model"] != "base" and asked["model"] not in self.adapters:
            return 404, {"error": {"message": f"The model `{asked['model']}` does not exist.", "code": 404}}
        model = self.model if self.ignores_adapters else self.adapters.get(asked["model"], self.model)
        if "prompt_logprobs" in asked:
            return 200, {"choices": [{"prompt_logprobs": read(model, asked["prompt"])}]}
        generator = torch.Generator().manual_seed(asked["seed"])
        written = [write(model, asked, generator, is_raw=self.is_raw) for _ in range(asked["n"])]
        return 200, {"choices": [choice | {"index": index} for index, choice in enumerate(written)]}


@torch.no_grad()
def read(model: Any, ids: list[int]) -> list[Any]:
    """The log-probabilities of a prompt as vLLM gives them."""
    table = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return [None, *({str(token): {"logprob": float(row[token])}} for row, token in zip(table, ids[1:], strict=False))]


@torch.no_grad()
def write(model: Any, asked: dict[str, Any], generator: torch.Generator, *, is_raw: bool) -> dict[str, Any]:
    """A completion as vLLM gives it, with log-probabilities at the temperature, or raw at 1."""
    ids, written, log_probs = list(asked["prompt"]), [], []
    while len(written) < asked["max_tokens"] and not (written and written[-1] in asked["stop_token_ids"]):
        logits = model(input_ids=torch.tensor([ids + written])).logits[0, -1].float()
        scaled = logits / asked["temperature"]
        token = int(torch.multinomial(scaled.softmax(-1), 1, generator=generator))
        log_probs.append(float((logits if is_raw else scaled).log_softmax(-1)[token]))
        written.append(token)
    return {"token_ids": written, "logprobs": {"token_logprobs": log_probs}}
