"""Serves a run's reward model, with transformers, peft and the standard library: perl rl --reward http://127.0.0.1:8000/

python serve.py runs/reward --port 8000
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, HTTPServer

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def load(folder: str) -> tuple:
    """The reward model and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    model = PeftModel.from_pretrained(model, folder).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def as_text(tokenizer: object, prompt: object, completion: object) -> str:
    """A prompt and its completion as the model was trained on them: a chat by the template, text as it is."""
    if isinstance(prompt, str):
        return prompt + completion + tokenizer.eos_token
    return tokenizer.apply_chat_template(prompt + completion, tokenize=False)


@torch.no_grad()
def scores(model: object, tokenizer: object, prompts: list, completions: list) -> list[float]:
    """One score for each completion."""
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        text = as_text(tokenizer, prompt, completion)
        inputs = tokenizer(text, add_special_tokens=isinstance(prompt, str), return_tensors="pt").to(model.device)
        found.append(float(model(**inputs).logits[0, 0]))
    return found


def serve(folder: str, port: int) -> HTTPServer:
    """A server that scores what is posted to it; `serve_forever` starts it."""
    model, tokenizer = load(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps(scores(model, tokenizer, asked["prompts"], asked["completions"])).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return HTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve a run's reward model.")
    parser.add_argument("run", help="folder of a `perl reward` run")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    serve(given.run, given.port).serve_forever()
