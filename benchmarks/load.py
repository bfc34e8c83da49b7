"""A server under load: many clients, many subsets of one base; each answer is checked, none may be lost.

    OMP_NUM_THREADS=1 python -m benchmarks.load --json benchmarks/results/load.json

A random model of GPT-2 small's size, or a causal one from a folder (`--model`), in float32, and 100 random subsets of a
fraction epsilon each, in a folder as `peft-dst serve` has them. 64 clients send one request after another over the
loopback: completions and chats, half of them streamed, each for a random subset and greedy. "base alone" is the same
traffic with every request for the base, which needs no switch and no mixed batch; the two take turns, round by round, after
a first ("cold") round for the subsets. The server runs in a thread beside the clients, so that their work counts as its
own. A sample of the answers is compared with what `generate` makes of the same prompt, one at a time, with the delta
written into the weights. Needs the extra `serve`, and httpx.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import torch
import transformers
import uvicorn
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from tqdm import tqdm

from peft_dst.delta import SparseDelta
from peft_dst.server.app import create_app
from peft_dst.server.service import Service

from . import common
from .switching import random_delta


BASE = "base"
SECONDS = 600.0
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass(frozen=True)
class Ask:
    """A request.

    Attributes:
        model: name of a subset, or the base's.
        text: the prompt, or what the user says in a chat.
        limit: new tokens at most.
        stream: whether the answer comes in pieces.
        chat: whether it is a chat.
    """

    model: str
    text: str
    limit: int
    stream: bool = False
    chat: bool = False


@dataclass(frozen=True)
class Answer:
    """What a client got.

    Attributes:
        ask: what it had asked for.
        status: HTTP's; 200 also of a stream that ends with an error.
        text: the answer.
        tokens: of the answer.
        error: the error's body, if there was one.
        seconds: until it was whole.
        first: seconds until the first piece, of a stream.
    """

    ask: Ask
    status: int
    text: str
    tokens: int
    error: dict[str, Any] | None
    seconds: float
    first: float | None


async def send(client: httpx.AsyncClient, ask: Ask) -> Answer:
    """One request, and its answer."""
    body: dict[str, Any] = {"model": ask.model, "max_tokens": ask.limit, "temperature": 0, "stream": ask.stream}
    if ask.stream:
        body["stream_options"] = {"include_usage": True}
    body |= {"messages": [{"role": "user", "content": ask.text}]} if ask.chat else {"prompt": ask.text}
    begin, first, events = time.perf_counter(), None, []
    async with client.stream("POST", "/v1/chat/completions" if ask.chat else "/v1/completions", json=body) as response:
        if ask.stream and response.status_code == 200:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    first = first or time.perf_counter() - begin
                    events.append(json.loads(line[6:]))
        else:
            events.append(json.loads(await response.aread()))
    seconds = time.perf_counter() - begin
    text, tokens, error = "", 0, None
    for event in events:
        error = event.get("error", error)
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        for choice in event.get("choices", []):
            text += (choice.get("message") or choice.get("delta") or {}).get("content", "") + choice.get("text", "")
    return Answer(ask, response.status_code, text, tokens, error, seconds, first)


async def in_turn(client: httpx.AsyncClient, asks: Iterable[Ask]) -> list[Answer]:
    """A client's requests, one after the other."""
    return [await send(client, ask) for ask in asks]


def connections(url: str) -> httpx.AsyncClient:
    """Connections to a server, as many as are needed at once."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=SECONDS, limits=limits, trust_env=False)


async def traffic(url: str, plans: Sequence[Sequence[Ask]]) -> list[Answer]:
    """The requests of many clients at the same time."""
    async with connections(url) as client:
        found = await asyncio.gather(*(in_turn(client, plan) for plan in plans))
    return [answer for answers in found for answer in answers]


def planned(
    rng: random.Random, names: Sequence[str], texts: Sequence[str], clients: int, each: int, limit: int, chats: bool
) -> list[list[Ask]]:
    """What each client asks for."""
    return [
        [
            Ask(rng.choice(names), rng.choice(texts), limit, rng.random() < 0.5, chats and rng.random() < 0.5)
            for _ in range(each)
        ]
        for _ in range(clients)
    ]


@contextlib.contextmanager
def served(service: Service, **options: Any) -> Iterator[str]:
    """The address of a server on a free port of the loopback, while it runs."""
    server = uvicorn.Server(uvicorn.Config(create_app(service, **options), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(60)
        if thread.is_alive():
            raise RuntimeError("the server does not end.")


@torch.no_grad()
def offline(model: Any, tokenizer: Any, folder: Path, ask: Ask) -> str:
    """What the model answers by itself, with the delta written into its weights for that.

    A completion is what it adds to the prompt's text, a chat's answer a text of its own.
    """
    text = ask.text
    if ask.chat:
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not ask.chat)["input_ids"]
    undo = None if ask.model == BASE else SparseDelta.load(folder / ask.model).apply(model)
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=ask.limit, do_sample=False)
    if undo is not None:
        undo.apply(model, check=False)
    if ask.chat:
        return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return tokenizer.decode(made[0], skip_special_tokens=True).removeprefix(
        tokenizer.decode(ids[0], skip_special_tokens=True)
    )


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    found = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50": found[49], "p90": found[89], "p99": found[98]}


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Latencies in seconds, and what went wrong."""
    return {
        "requests": len(answers),
        "errors": sum(answer.error is not None for answer in answers),
        "tokens": sum(answer.tokens for answer in answers),
        "latency": percentiles([answer.seconds for answer in answers]),
        "first_token": percentiles([answer.first for answer in answers if answer.first is not None]),
    }


def counted(service: Service) -> dict[str, int]:
    """What the server has done so far."""
    found = service.pool.statistics
    return {**service.engine.computed, "switches": found.switches, "loads": found.loads}


def word_tokenizer(size: int) -> Any:
    """A word for each token, so that texts and tokens are the same thing."""
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE)


def loaded(args: Any) -> tuple[nn.Module, Any]:
    """The model and its tokenizer."""
    if args.model is not None:
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        return model.eval(), transformers.AutoTokenizer.from_pretrained(args.model)
    torch.manual_seed(0)
    model = common.gpt2(args.toy).eval()
    return model, word_tokenizer(model.config.vocab_size)


def measure(args: Any, model: Any, tokenizer: Any, folder: Path) -> list[dict[str, Any]]:
    """A row for the traffic of all subsets, and one for that of the base alone."""
    rng = random.Random(0)
    names = [f"subset{i}" for i in range(args.subsets)]
    for i, name in enumerate(tqdm(names, unit="subset", disable=None)):
        delta = random_delta(model, args.epsilon, i, args.change).with_seeds(model)
        delta.described(base_model_name_or_path=BASE).save(folder / name)
    size = min(len(tokenizer), model.config.vocab_size)
    texts = [tokenizer.decode(rng.choices(range(size), k=rng.randrange(4, 13))) for _ in range(1000)]
    chats = bool(tokenizer.chat_template)
    titles = (f"{args.subsets} subsets", "base alone")
    answers: dict[str, list[Answer]] = {title: [] for title in titles}
    seconds: dict[str, list[float]] = {title: [] for title in titles}
    rates: dict[str, list[float]] = {title: [] for title in titles}
    done = {title: dict.fromkeys(("batches", "mixed_batches", "rows", "switches", "loads"), 0) for title in titles}
    service = Service(model, tokenizer, BASE, folder, queue=args.clients)
    with served(service) as url:
        # By the end of this subsets were read, and the server has found out what takes less time, mixing or switching.
        first = planned(rng, names, texts, args.clients, args.each, args.tokens, chats)
        begin = time.perf_counter()
        cold = sum(answer.tokens for answer in asyncio.run(traffic(url, first))) / (time.perf_counter() - begin)
        for turn in range(args.rounds):
            asks = planned(rng, names, texts, args.clients, args.each, args.tokens, chats)
            of_base = [[replace(ask, model=BASE) for ask in plan] for plan in asks]
            plans = dict(zip(titles, (asks, of_base), strict=True))
            for title in titles if turn % 2 == 0 else reversed(titles):
                before, begin = counted(service), time.perf_counter()
                found = asyncio.run(traffic(url, plans[title]))
                answers[title] += found
                seconds[title].append(time.perf_counter() - begin)
                rates[title].append(sum(answer.tokens for answer in found) / seconds[title][-1])
                after = counted(service)
                done[title] = {key: done[title][key] + after[key] - before[key] for key in done[title]}
                print(f"{title}: {args.clients * args.each} requests in {seconds[title][-1]:.1f} s")
    rows = []
    for title in titles:
        figures = summary(answers[title])
        sample = rng.sample(answers[title], min(args.check, len(answers[title])))
        rate = {"tokens_per_second": figures["tokens"] / sum(seconds[title])}
        rows.append({"case": title, **figures, **rate, **done[title], **checked(sample, model, tokenizer, folder)})
    # Of each round. Both have asked for as much, but may have got less, where an answer ends by itself.
    rounds = zip(*rates.values(), strict=True)
    rows[0]["cold_tokens_per_second"] = cold
    rows[0]["throughput"] = statistics.median(mixed / alone for mixed, alone in rounds)
    return rows


def checked(sample: Sequence[Answer], model: Any, tokenizer: Any, folder: Path) -> dict[str, int]:
    """How many of these are not what the model answers by itself; and how many are not what the base would say."""
    wrong = unlike = 0
    for answer in tqdm(sample, unit="answer", disable=None):
        wrong += answer.text != offline(model, tokenizer, folder, answer.ask)
        unlike += answer.text != offline(model, tokenizer, folder, replace(answer.ask, model=BASE))
    return {"checked": len(sample), "wrong": wrong, "unlike_base": unlike}


def main(arguments: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", type=Path, help="folder of a small causal model, in place of the random one")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--each", type=int, default=2, help="requests of each client in a round")
    parser.add_argument("--subsets", type=int, default=100)
    parser.add_argument("--epsilon", type=float, default=1e-4)
    parser.add_argument("--change", type=float, default=0.3, help="what a subset adds to each of its entries")
    parser.add_argument("--tokens", type=int, default=6, help="of each answer, at most")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--check", type=int, default=32, help="answers that are compared with offline ones")
    parser.add_argument("--toy", action="store_true", help="a tiny model: to see whether it runs")
    args = parser.parse_args(arguments)
    common.quiet()
    record = common.Record(args)
    if args.model is not None:
        record.document["options"]["model"] = args.model.name
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, *loaded(args), Path(folder))
    for row in rows:
        print(
            f"{row['case']}: {row['errors']} errors, {row['wrong']} of {row['checked']} answers wrong; "
            f"p50 {row['latency']['p50']:.2f} s, p99 {row['latency']['p99']:.2f} s, first token "
            f"{row['first_token']['p50']:.2f} s, {row['tokens_per_second']:.1f} tokens/s"
        )
    print(f"throughput of the subsets, relative to the base alone: {rows[0]['throughput']:.2f}")
    record.write(rows=rows)


if __name__ == "__main__":
    main()
