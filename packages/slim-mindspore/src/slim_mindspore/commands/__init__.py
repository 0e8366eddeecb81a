"""The commands of ``slim-mindspore``: one module each, with arguments and what they do."""
