"""How Sphinx builds these pages; `scripts/docs` runs it."""

from __future__ import annotations

import enum
import re
import warnings
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml
from pydantic import BaseModel
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import blockprune

# torch.jit warns while fvcore is imported, which is nothing a reader of these pages can change.
warnings.simplefilter("ignore")

project = "blockprune"
author = copyright = "blockprune developers"
version = release = blockprune.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
# `find_blocks` in a docstring leads to the function where these pages have it, and is code if not.
default_role = "py:obj"
nitpicky = True
# What is not ours has no page to lead to; nor have types that only annotations name.
nitpick_ignore_regex = [("py:.*", r"(?!blockprune\.).*"), ("py:class", r".*")]

autodoc_default_options = {"members": True}
autodoc_member_order = "groupwise"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Law", "Laws", "Source", "Sources"]

# Formulas as MathML, which browsers draw without a script from the network.
html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"blockprune {release}"
html_copy_source = False
html_show_sphinx = False

DRAWN = re.compile(r"(?:^    .*\n|^\n(?=    ))+", re.MULTILINE)
QUOTED = re.compile(r"``.+?``|`[^`]+`\w?", re.DOTALL)


def linked(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element
) -> nodes.Element | None:
    """Return a link from the short name, or the home, of an object to where its page has it."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or node.get("refdoc") is None:
        return None
    last = target.rpartition(".")[2]
    is_ours = "." not in target or target.startswith("blockprune.")
    python = env.domains.python_domain
    places = [name for name in python.objects if is_ours and name.rpartition(".")[2] == last]
    kinds = ("class", "exception", "function", "data")
    places = [name for name in places if python.objects[name].objtype in kinds]
    if not places:
        return None
    place = min(places, key=lambda name: (len(name), name))
    return python.resolve_xref(env, node["refdoc"], app.builder, "obj", place, node, content)


def with_plain_headings(
    app: Sphinx, what: str, name: str, documented: Any, options: Any, lines: list[str]
) -> None:
    """Take the remark off a heading such as ``Raises (when called):``."""
    lines[:] = [re.sub(r"^Raises \(.*\):$", "Raises:", line) for line in lines]


def with_what_docstrings_lack(
    app: Sphinx, what: str, name: str, documented: Any, options: Any, lines: list[str]
) -> None:
    """Draw the tree of a module as it is, and list the fields that pydantic describes."""
    text = "\n".join(lines) + "\n"
    if what == "module" and "\u2500" in text and "::\n" not in text:
        text = DRAWN.sub(lambda tree: f"::\n\n{tree[0]}\n", text)
    lines[:] = QUOTED.sub(_closed, text).splitlines()
    if what == "class" and isinstance(documented, type) and issubclass(documented, BaseModel):
        for field, about in documented.model_fields.items():
            if about.description:
                lines += ["", f"``{field}``{_default(about)}", f"    {about.description}"]


def _closed(quoted: re.Match[str]) -> str:
    """Let a letter follow a quotation, as in `GraphModule`s."""
    text = quoted[0]
    return text if text.endswith("`") else f"{text[:-1]}\\ {text[-1]}"


def _default(about: Any) -> str:
    if about.is_required():
        return " (required)"
    value = about.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return ""
    value = value.value if isinstance(value, enum.Enum) else value
    return f" = ``{value!r}``"


def is_elsewhere(
    app: Sphinx, what: str, name: str, member: Any, skip: bool, options: Any
) -> bool | None:
    """Leave errors to their own page, and out what pydantic adds."""
    home = getattr(member, "__module__", None)
    is_error = home == "blockprune.errors" and app.env.docname != "api/errors"
    return True if is_error or name == "model_config" else None


def without_fields(
    app: Sphinx, what: str, name: str, documented: Any, options: Any, *signature: str | None
) -> tuple[str, None] | None:
    """Spare readers the signature of a class whose fields are listed below it."""
    is_model = isinstance(documented, type) and issubclass(documented, BaseModel)
    return ("", None) if is_model else None


def inline_formula(self: Any, node: nodes.math) -> None:
    self.body.append(latex2mathml.tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def block_formula(self: Any, node: nodes.math_block) -> None:
    drawn = latex2mathml.tex2mathml(node.astext(), as_block=True)
    # Room for what reaches beyond its line, or the theme scrolls it.
    self.body.append(f'<div class="math" style="overflow: hidden; padding: 0.3em 0">{drawn}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (inline_formula, None), (block_formula, None))
    app.connect("missing-reference", linked)
    app.connect("autodoc-skip-member", is_elsewhere)
    app.connect("autodoc-process-signature", without_fields)
    # Napoleon, at 500, knows headings without a remark, and makes of them what is last touched up.
    app.connect("autodoc-process-docstring", with_plain_headings, priority=400)
    app.connect("autodoc-process-docstring", with_what_docstrings_lack, priority=600)
