r"""Serve a converted model over HTTP: a low-rank or dense checkpoint, in a transformers pipeline.

`04_language_model.py` writes both forms; `03_finetune_adapter.py` writes a dense one:

    python examples/08_serve.py --model runs/language_model/low_rank
    python examples/08_serve.py --model runs/finetune_adapter/merged --task text-classification

    curl localhost:8000 -d '{"inputs": "The \"if\" statement", "parameters": {"max_new_tokens": 20}}'

Requests have the form of the Hub's inference API: `inputs`, a text or a list of texts, and `parameters` of the pipeline.
For many users at once, use a server made for that, with the checkpoint of `save_dense`; this one answers one at a time.
"""

import json
import sys
import threading
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from transformers import HfArgumentParser, Pipeline, pipeline

import oialr_peft  # noqa: F401  (lets transformers load low-rank checkpoints)

LARGEST_REQUEST = 1_000_000  # bytes


@dataclass
class ServerArguments:
    """What to serve, and where."""

    model: str = field(default="runs/language_model/low_rank", metadata={"help": "Hub id or path of a checkpoint."})
    task: str = field(default="text-generation", metadata={"help": "Task of the pipeline."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen at; 0.0.0.0 is open to others."})
    port: int = field(default=8000, metadata={"help": "Port to listen at; 0 is any that is free."})


class Handler(BaseHTTPRequestHandler):
    """Answers POST with what the pipeline returns, and GET with what is served, as JSON."""

    pipeline: Pipeline
    one_at_a_time = threading.Lock()

    def do_GET(self) -> None:
        """Say what is served."""
        model = self.pipeline.model
        facts = {"task": self.pipeline.task, "model": model.name_or_path, "parameters": model.num_parameters()}
        self.answer(HTTPStatus.OK, facts)

    def do_POST(self) -> None:
        """Run the pipeline."""
        size = int(self.headers.get("Content-Length", 0))
        if size > LARGEST_REQUEST:
            self.answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"error": f"Send at most {LARGEST_REQUEST:,} bytes."})
            return
        try:
            request = json.loads(self.rfile.read(size))
            inputs, parameters = request["inputs"], request.get("parameters", {})
        except (ValueError, KeyError, TypeError, AttributeError):
            self.answer(HTTPStatus.BAD_REQUEST, {"error": 'Send JSON such as {"inputs": "a text", "parameters": {}}.'})
            return
        try:
            with self.one_at_a_time:
                found = self.pipeline(inputs, **parameters)
        except (ValueError, TypeError) as error:
            self.answer(HTTPStatus.UNPROCESSABLE_ENTITY, {"error": str(error)})
            return
        self.answer(HTTPStatus.OK, found)

    def answer(self, status: HTTPStatus, body: object) -> None:
        """Send JSON."""
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def main() -> None:
    (args,) = HfArgumentParser(ServerArguments).parse_args_into_dataclasses()
    if args.model == ServerArguments.model and not Path(args.model).is_dir():
        sys.exit(f"There is no {args.model}. Run examples/04_language_model.py first, or name another --model.")
    Handler.pipeline = pipeline(args.task, model=args.model)
    with ThreadingHTTPServer((args.host, args.port), Handler) as server:
        print(f"serving {args.model} at http://{args.host}:{server.server_address[1]}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
