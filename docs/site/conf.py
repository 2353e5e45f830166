"""How Sphinx builds the site; ``build.py`` beside it prepares the pages."""

import re
from html import escape

from docutils.nodes import SkipNode
from docutils.utils.math import MathError, latex2mathml
from sphinx.util import logging

project = "nsvd"
author = "the nsvd authors"
copyright = "the nsvd authors, Apache 2.0"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "nsvd"
html_static_path = ["static"]
html_favicon = "static/favicon.svg"
html_css_files = ["site.css"]
html_js_files = ["tables.js"]
html_show_sphinx = False
html_copy_source = False
html_math_renderer = "mathml"
templates_path = []
exclude_patterns = ["notebooks/source", "notebooks/executed"]
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_image_options = {"align": "center"}
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["config.cache"]
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_use_rtype = False
napoleon_use_param = False

SPELLINGS = (  # of TeX, that docutils does not read or reads otherwise, and what it reads
    (r"\\[bB]igg?[lr]?(?![a-zA-Z])", ""),
    (r"\\dots(?![a-zA-Z])", r"\\ldots"),
    (r"(\\[td]?frac)(\d)(\d)", r"\1{\2}{\3}"),
)
BAR = ('<mo accent="true">_</mo>', '<mo accent="true" stretchy="true">‾</mo>')  # over a formula, as wide as it is


def _mathml(node, as_block):
    """MathML of a formula; sizes of brackets are left to the browser, which stretches them.

    A formula that cannot be read is a warning, which names its page and fails the build.
    """
    text = node.astext()
    for spelled, known in SPELLINGS:
        text = re.sub(spelled, known, text)
    try:
        return latex2mathml.tex2mathml(text, as_block=as_block).replace(*BAR)
    except MathError as error:
        logging.getLogger(__name__).warning("formula %r: %s", text, error, location=node)
        return escape(text)


def _inline(translator, node):
    translator.body.append(_mathml(node, False))
    raise SkipNode


def _block(translator, node):
    translator.body.append(translator.starttag(node, "div", CLASS="math"))
    translator.body.append(_mathml(node, True))
    translator.body.append("</div>")
    raise SkipNode


def setup(app):
    """Formulas become MathML, which browsers show without a script."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
