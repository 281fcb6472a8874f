"""The lines of config in docs/evaluators.md are settings that there are."""
import re

from helpers import ROOT

from cb_vit.settings import check
from configs import digits


def test_every_block_of_the_page_is_read():
    text, names = (ROOT / "docs/evaluators.md").read_text(), {"config": (config := digits.get_config())}
    for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(snippet, names)
    kinds = {block.type for block in check(config).evals.values()}
    assert kinds == {kind for line in text.splitlines() for kind in re.findall(r"^\| \[`(\w+)`\]\(#", line)}
