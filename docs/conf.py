from importlib import metadata

project = "mono-quant"
author = "the mono-quant developers"
project_copyright = author
release = metadata.version("mono-quant")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
default_role = "literal"  # one backtick is code, as in Markdown
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # else an attribute that a class docstring lists is described twice

html_theme = "furo"
html_title = f"mono-quant {release}"
