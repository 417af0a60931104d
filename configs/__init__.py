"""One experiment a file. Each defines `config`; its docstring is a lab note. `_imagenet` holds what several share."""
