"""The commands of `gnvc`, one function each; `gnvc_jax.cli` finds, parses and runs them.

A command is a plain function: tyro derives options and help from its signature and docstring. It
returns an exit code and raises `GnvcError` for what the user can repair. A command with a parameter
`settings` receives the arguments that it does not define itself; `train` and `plan` apply them to
the experiment. Modules are imported when one of their commands is chosen, and commands import
what is heavy when they run, so that help appears at once.
"""
