"""The package of transformers' tests: files that its archive lacks here, the others where `archive.py` put them."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
