"""Pages of the site that come from files at the root of the repository, for mkdocs."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {  # page of the site: file in the repository
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "small.md": "gnvc_jax/pretrained/small.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds PAGES, with links that lead to other pages of the site."""
    for page, source in PAGES.items():
        text = (ROOT / source).read_text()
        text = re.sub(r"\]\(docs/", "](", text)
        for target, path in PAGES.items():
            text = text.replace(f"]({path})", f"]({target})")
        text = re.sub(r"\[([^\]]+)\]\(CITATION\.cff\)", r"\1", text)  # not a page
        files.append(File.generated(config, page, content=text))
    return files
