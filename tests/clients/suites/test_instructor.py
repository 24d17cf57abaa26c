"""instructor: typed answers by a call of a function, by a schema and by JSON, whole, as a list and piece by piece."""

import instructor
import openai
import pytest
from pydantic import BaseModel, Field

QUESTION = [{"role": "user", "content": "Jason is 25 years old and lives in Paris. Extract name, age and city."}]


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)
    city: str = Field(max_length=20)


def client(coder, mode):
    return instructor.from_openai(openai.OpenAI(base_url=f"{coder[0]}/v1", api_key="none", max_retries=0), mode=mode)


PARAMETERS = {"model": "coder", "messages": QUESTION, "temperature": 0, "max_tokens": 200}


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.JSON, instructor.Mode.MD_JSON])
def test_an_answer_has_a_type(coder, mode):
    person = client(coder, mode).create(response_model=Person, max_retries=1, **PARAMETERS)
    assert (person.name, person.age) == ("Jason", 25)


def test_a_type_grows_piece_by_piece(coder):
    people = list(client(coder, instructor.Mode.TOOLS).create_partial(response_model=Person, **PARAMETERS))
    assert len(people) > 3 and people[0].age is None and people[-1].age == 25


def test_a_list_of_answers(coder):
    people = list(client(coder, instructor.Mode.TOOLS).create_iterable(response_model=Person, **PARAMETERS))
    assert people and all(isinstance(person, Person) for person in people)
