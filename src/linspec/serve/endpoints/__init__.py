"""One module an endpoint, each with a `router`."""
