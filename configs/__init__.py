"""One experiment a file. Each defines `config`; its docstring is a lab note. `_imagenet` and `_classify` hold
what several share."""
