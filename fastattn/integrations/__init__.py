"""fastattn inside other libraries' models; each module imports the library that it is named after."""
