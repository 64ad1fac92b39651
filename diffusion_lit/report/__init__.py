"""Reports as HTML: the page that every report is made of, and the page of a run (`diffusion-lit report`)."""

from diffusion_lit.report.page import Page

__all__ = ["Page"]
