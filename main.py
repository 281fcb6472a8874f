"""`cb-vit train`, in a clone: `python main.py --config=configs/digits.py --workdir=runs/digits`."""
from cb_vit.tools import cli, train

if __name__ == "__main__":
    cli.run(train)
