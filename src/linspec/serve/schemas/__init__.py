"""What the API takes and gives, as pydantic models: the OpenAPI page is made of them."""
