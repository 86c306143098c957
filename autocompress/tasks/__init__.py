"""Built-in tasks: name -> where the function is that returns the Task."""

BUILT_IN = {"digits": "autocompress.tasks.digits:digits"}
